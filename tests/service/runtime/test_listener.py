"""The listening socket."""

import asyncio
import socket

import pytest

from service.runtime.listener import ListenError, open_listener


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_answers_on_a_kept_connection_do_not_wait_for_acknowledgements(host: str) -> None:
    accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        accepted.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    try:
        listener = open_listener(host, 0)
    except ListenError as exc:
        pytest.skip(f"this machine has no {host}: {exc}; enable the address family to run this")
    server = await asyncio.start_server(serve, sock=listener)
    async with server:
        _, writer = await asyncio.open_connection(host, listener.getsockname()[1])
        assert await asyncio.wait_for(accepted, 20)
        writer.close()
        await writer.wait_closed()


def test_a_port_that_is_taken_is_an_error() -> None:
    with open_listener("127.0.0.1", 0) as taken, pytest.raises(ListenError, match="in use"):
        open_listener("127.0.0.1", taken.getsockname()[1])
