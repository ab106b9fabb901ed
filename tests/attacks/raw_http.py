"""Requests byte by byte: unfinished, slow, or no HTTP at all."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.integration.processes import ServiceProcess

TIMEOUT_S = 30.0


@contextmanager
def connected(server: ServiceProcess, port: int | None = None) -> Iterator[socket.socket]:
    """Open a connection to the service, or to another of its ports."""
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, port or url.port or 80), timeout=TIMEOUT_S) as connection:
        yield connection


def head(path: str, num_bytes: int, *headers: str, method: str = "POST") -> bytes:
    """Return the head of a request whose body will have so many bytes of JSON."""
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: test",
        "Content-Type: application/json",
        f"Content-Length: {num_bytes}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def read_status(connection: socket.socket) -> int | None:
    """Wait for the status of an answer; None where the connection is closed without one."""
    try:
        line = connection.recv(12)
        while 0 < len(line) < 12 and (more := connection.recv(12 - len(line))):
            line += more
    except ConnectionError:
        return None
    return int(line[9:12]) if line else None


def read_all(connection: socket.socket) -> bytes:
    """Read until the service closes the connection."""
    received = b""
    try:
        while data := connection.recv(2**16):
            received += data
    except ConnectionError:
        pass
    return received


def is_open(connection: socket.socket) -> bool:
    """Return whether the service holds a connection on which it has nothing to say."""
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False
    finally:
        connection.settimeout(TIMEOUT_S)
