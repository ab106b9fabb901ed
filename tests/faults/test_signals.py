"""Signals while the model is being loaded and while the process drains: exit codes, and no traceback."""

import asyncio
import contextlib
import json
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.faults.clients import ask, client_of, faulty_service, has, request
from tests.faults.faulty_device import HOLD
from tests.integration.processes import START_TIMEOUT_S, ServiceProcess, poll, poll_async, service


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=lambda sent: sent.name)
def test_a_signal_while_loading_ends_the_process_quietly(
    random_checkpoint: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    loading = ServiceProcess(tmp_path, module="tests.faults.endless_loading", model=random_checkpoint)
    try:
        poll(lambda: "loading" in loading.output, START_TIMEOUT_S, "the loader")
        loading.process.send_signal(sent)
        assert loading.wait() == 0
        messages = [json.loads(line)["message"] for line in loading.errors.splitlines()]
        assert messages == ["draining, 0 requests in flight"]
    finally:
        loading.kill()


async def test_a_second_signal_ends_the_process_at_once(random_checkpoint: Path, tmp_path: Path) -> None:
    with faulty_service(tmp_path, model=random_checkpoint) as faulty:
        async with client_of(faulty.url) as client:
            (tmp_path / HOLD).touch()
            unanswered = asyncio.create_task(ask(client, request(1)))
            await poll_async(lambda: has(client, "blip2_running 1.0"), 60)
            faulty.terminate()
            await poll_async(lambda: is_draining(client), 60)
            faulty.terminate()
            with pytest.raises(httpx.HTTPError):
                await unanswered
        assert faulty.wait() == 1
        assert faulty.errors.endswith("blip2: ended by a second signal\n")
        assert "Traceback" not in faulty.errors


async def is_draining(client: httpx.AsyncClient) -> bool:
    return "draining" in (await client.get("/readyz")).text


def test_callers_that_have_connected_before_the_end_are_answered(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    with service(tmp_path, model=random_checkpoint) as stopping:
        url = httpx.URL(stopping.url)
        address = (url.host, url.port or 80)
        silent = [socket.create_connection(address) for _ in range(20)]
        with ThreadPoolExecutor(4) as threads:
            asking = [threads.submit(call_until_refused, address) for _ in range(4)]
            poll(lambda: stopping.total("blip2_requests_total") > 100, 60, "requests")
            stopping.terminate()
            poll(lambda: any(thread.done() for thread in asking), 60, "the listener's end")
            answers = [exchange(connection) for connection in silent]
            answers += [answer for thread in asking for answer in thread.result()]
        assert stopping.wait() == 0
    assert {answer.split(b"\r\n")[0] for answer in answers} == {
        b"HTTP/1.1 200 OK",
        b"HTTP/1.1 503 Service Unavailable",
    }


def call_until_refused(address: tuple[str, int]) -> list[bytes]:
    """Return the answers to requests, each on a connection of its own, until no more can be made."""
    answers = []
    with contextlib.suppress(ConnectionRefusedError):
        while True:
            answers.append(exchange(socket.create_connection(address)))
    return answers


def exchange(connection: socket.socket) -> bytes:
    """Send a request, and return the beginning of the answer, b"" where the connection was closed instead."""
    with connection:
        connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: test\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            return connection.recv(4096)
    return b""
