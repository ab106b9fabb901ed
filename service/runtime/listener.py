"""The listening socket. Imports nothing that is slow, so that a taken port is reported at once."""

import socket
from typing import Final

BACKLOG: Final = 2048


class ListenError(Exception):
    """The address cannot be listened on; the message is one line for the operator."""


def open_listener(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0 is any free one. Raises ListenError."""
    address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio turns Nagle's algorithm off only where it is: without, each
    # answer on a kept connection waits 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(address_family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as exc:
        listener.close()
        raise ListenError(
            f"cannot listen on {host}:{port}: {exc.strerror or exc}; set BLIP2_HOST or BLIP2_PORT to others"
        ) from exc
    return listener
