"""The listening socket, and how many connections it may have.

Imports nothing that is slow, so that a taken port is reported at once.
"""

import contextlib
import socket
from typing import Final

BACKLOG: Final = 2048
NUM_EXTRA: Final = 16  # connections beyond the limit, for probes
MAX_PROBE_CONNECTIONS: Final = 32  # on the port of their own
# Files beside connections: weights, Redis, worker processes, and those accepted but not yet counted.
_OTHER_FILES: Final = 128


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


def accept_backlog(listener: socket.socket) -> list[socket.socket]:
    """Return the connections that were made and not accepted yet, within the limit of open files."""
    listener.setblocking(False)
    accepted = []
    with contextlib.suppress(OSError):  # BlockingIOError where there is none left
        while True:
            accepted.append(listener.accept()[0])
    return accepted


def limit_connections(max_connections: int) -> int:
    """Return how many connections the limit of open files allows, which is raised as far as may be.

    Raises ValueError where there is room for none.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return max_connections
    others = _OTHER_FILES + NUM_EXTRA + MAX_PROBE_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return max_connections
    needed = max_connections + others
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft <= others:
        raise ValueError(f"the limit of open files is {soft}, and {others} are needed; raise it (ulimit -n)")
    return min(max_connections, soft - others)
