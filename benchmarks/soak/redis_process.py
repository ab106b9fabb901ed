"""A redis-server on a free port, without persistence."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.server_process import free_port

_TIMEOUT_S = 30.0
_POLL_S = 0.05


@contextmanager
def redis_server() -> Iterator[str]:
    """Start redis-server and yield its URL. Raise TimeoutError if it does not respond."""
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait(port)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()


def _wait(port: int) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not _responds(port):
        if time.monotonic() > deadline:
            raise TimeoutError(f"redis-server did not answer within {_TIMEOUT_S:g} s")
        time.sleep(_POLL_S)


def _responds(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(5) == b"+PONG"
    except OSError:
        return False
