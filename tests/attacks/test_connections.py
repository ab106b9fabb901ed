"""Connections that are silent, slow or too many: probes and small requests are answered throughout."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from tests.attacks.harness import MemoryWatch, bystander
from tests.integration.processes import ServiceProcess, poll, service

NUM_FILES = 1024
NUM_ATTACKERS = 1100  # more than the service may have open
MAX_LOG_LINES = 20
MAX_GROWTH_BYTES = 200 * 2**20
HEAD = (
    b"POST /caption HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
)

pytestmark = pytest.mark.serial


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """Start `tiny` with few open files, a second port for probes, and only warnings in the log."""
    with service(
        tmp_path_factory.mktemp("limited"),
        module="tests.attacks.limited_service",
        variables={"NUM_FILES": str(NUM_FILES)},
        probe_port=0,
        log_level="WARNING",
    ) as started:
        yield started


def connect(server: ServiceProcess) -> socket.socket:
    url = httpx.URL(server.url)
    return socket.create_connection((url.host, url.port), timeout=30)


def is_closed(connection: socket.socket) -> bool:
    """Return whether the service has closed this connection, on which it had nothing to say."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


@contextmanager
def crowd(server: ServiceProcess, first_bytes: bytes) -> Iterator[list[socket.socket]]:
    """Open more connections than there may be, and send the first bytes on each."""
    with ExitStack() as stack:
        connections = []
        for _ in range(NUM_ATTACKERS):
            connection = stack.enter_context(connect(server))
            connection.sendall(first_bytes)
            connections.append(connection)
        yield connections


@pytest.mark.parametrize(
    "first_bytes",
    [b"", b"GET /livez HTTP/1.1\r\nHost: te", HEAD + b'{"image"'],
    ids=["silent", "half a head", "half a body"],
)
def test_more_connections_than_open_files_keep_nobody_out(
    limited: ServiceProcess, first_bytes: bytes
) -> None:
    num_lines = limited.errors.count("\n")
    with MemoryWatch(limited) as memory, bystander(limited) as others, crowd(limited, first_bytes):
        poll(lambda: len(others.probe_seconds) > 20 and len(others.caption_seconds) > 10, 30, "both")
    assert memory.growth_bytes < MAX_GROWTH_BYTES
    assert limited.errors.count("\n") - num_lines < MAX_LOG_LINES, limited.errors[-2000:]
