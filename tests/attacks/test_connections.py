"""Connections that are silent, slow or too many: probes and small requests are answered throughout."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.attacks.harness import MemoryWatch, bystander
from tests.attacks.raw_http import connected, head, is_open, read_status
from tests.faults.clients import faulty_service
from tests.faults.faulty_device import HOLD
from tests.integration.pictures import in_base64, picture
from tests.integration.processes import ServiceProcess, poll, service

pytestmark = pytest.mark.serial

NUM_FILES = 1024
NUM_ATTACKERS = 1100  # more than the service may have open
MAX_LOG_LINES = 20
MAX_GROWTH_BYTES = 200 * 2**20
HEADER_TIMEOUT_S = 10.0
NUM_EXTRA, NUM_PROBES = 16, 32  # connections beyond the limit, and those of the port for probes
HALF_HEAD = b"GET /livez HTTP/1.1\r\nHost: te"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


PROBE_PORT = free_port()


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """Start `tiny` with few open files, a second port for probes, and only warnings in the log."""
    with service(
        tmp_path_factory.mktemp("limited"),
        module="tests.attacks.limited_service",
        variables={"NUM_FILES": str(NUM_FILES)},
        probe_port=PROBE_PORT,
        log_level="WARNING",
    ) as started:
        yield started


@contextmanager
def crowd(server: ServiceProcess, num_connections: int, first_bytes: bytes) -> Iterator[list[socket.socket]]:
    """Open connections, at most five hundred a second, and send the first bytes on each."""
    with ExitStack() as stack:
        connections = []
        for _ in range(num_connections):
            connection = stack.enter_context(connected(server))
            with contextlib.suppress(ConnectionError):
                connection.sendall(first_bytes)
            connections.append(connection)
            time.sleep(0.002)  # faster, and it would measure how many requests a second are refused
        yield connections


def probe(port: int, path: str = "/livez") -> int:
    return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=5).status_code


@pytest.mark.parametrize(
    "first_bytes",
    [b"", HALF_HEAD, head("/caption", 1000) + b'{"image"', b"\x16\x03\x01 no HTTP\r\n\r\n"],
    ids=["silent", "half a head", "half a body", "no HTTP"],
)
def test_more_connections_than_open_files_keep_nobody_out(
    limited: ServiceProcess, first_bytes: bytes
) -> None:
    num_lines = limited.errors.count("\n")
    with (
        MemoryWatch(limited) as memory,
        bystander(limited) as others,
        crowd(limited, NUM_ATTACKERS, first_bytes),
    ):
        poll(lambda: len(others.probe_seconds) > 20 and len(others.caption_seconds) > 10, 30, "both")
        assert probe(PROBE_PORT) == 200
    assert memory.growth_bytes < MAX_GROWTH_BYTES
    assert limited.errors.count("\n") - num_lines < MAX_LOG_LINES, limited.errors[-2000:]
    assert "Traceback" not in limited.errors


def test_slow_heads_are_closed_in_time_however_they_trickle(limited: ServiceProcess) -> None:
    with connected(limited) as silent, connected(limited) as half, connected(limited) as kept:
        started = time.monotonic()
        half.sendall(HALF_HEAD)
        kept.sendall(b"GET /livez HTTP/1.1\r\nHost: test\r\n\r\n")
        assert read_status(kept) == 200
        kept.recv(2**16)  # the rest of the answer: from here on, the time for idle connections holds
        with contextlib.suppress(ConnectionError):
            while is_open(half) and time.monotonic() - started < HEADER_TIMEOUT_S + 5:
                half.sendall(b"s")
                time.sleep(0.2)  # a slow client is meant
        seconds = time.monotonic() - started
        assert HEADER_TIMEOUT_S - 0.5 <= seconds <= HEADER_TIMEOUT_S + 2.5
        poll(lambda: not is_open(silent), 3, "the end of the silent connection")
        assert is_open(kept)


def test_where_all_connections_are_busy_probes_are_answered_and_the_rest_is_refused(tmp_path: Path) -> None:
    limit = 16
    with faulty_service(tmp_path, model="tiny", stall_timeout_ms=120_000, max_connections=limit) as held:
        port = httpx.URL(held.url).port
        assert port is not None
        (tmp_path / HOLD).touch()
        body = json.dumps({"image": in_base64(picture(0)), "num_beams": 1}).encode()
        request = head("/caption", len(body)) + body
        with crowd(held, limit, request) as connections:
            poll(lambda: held.total("blip2_waiting") + held.total("blip2_running") == limit, 30, "all busy")
            assert [probe(port, path) for path in ("/livez", "/readyz", "/version")] == [200] * 3
            refused = httpx.post(f"{held.url}/caption", content=body, timeout=5)
            assert (refused.status_code, refused.json()["code"]) == (503, "too_many_connections")
            assert refused.headers["connection"] == "close"
            assert int(refused.headers["retry-after"]) > 0
            with crowd(held, NUM_EXTRA + 1, b""):  # the extra ones are silent, so that one makes room
                assert probe(port) == 200
            (tmp_path / HOLD).unlink()
            assert [read_status(connection) for connection in connections] == [200] * limit
        assert httpx.post(f"{held.url}/caption", content=body, timeout=30).status_code == 200
        assert held.metric('blip2_shed_total{reason="too_many_connections"}') == 1


def test_callers_that_do_not_read_make_room(tmp_path: Path) -> None:
    limit = 16
    requests = b"GET /openapi.json HTTP/1.1\r\nHost: test\r\n\r\n" * 500  # more than buffers take
    body = {"image": in_base64(picture(0)), "num_beams": 1}
    with service(tmp_path, model="tiny", max_connections=limit) as running, ExitStack() as stack:
        for _ in range(limit + NUM_EXTRA):
            stack.enter_context(connected(running)).sendall(requests)

        def is_answered() -> bool:
            return httpx.post(f"{running.url}/caption", json=body, timeout=30).status_code == 200

        poll(is_answered, 30, "room")  # until the buffers are full, they are busy
        assert all(is_answered() for _ in range(limit))
        assert httpx.get(f"{running.url}/livez", timeout=5).status_code == 200


def test_the_port_for_probes_serves_nothing_else(limited: ServiceProcess) -> None:
    paths = ("/livez", "/readyz", "/startupz", "/health", "/version", "/metrics")
    assert [probe(PROBE_PORT, path) for path in paths] == [200] * len(paths)
    for path in ("/docs", "/openapi.json", "/", "/nowhere"):
        assert probe(PROBE_PORT, path) == 404
    refused = httpx.post(f"http://127.0.0.1:{PROBE_PORT}/caption", json={"image": in_base64(picture(0))})
    assert (refused.status_code, refused.json()["code"]) == (404, "not_found")
    assert "not served on this port" in refused.json()["detail"]
    with ExitStack() as stack:
        silent = [stack.enter_context(connected(limited, PROBE_PORT)) for _ in range(NUM_PROBES + 8)]
        assert probe(PROBE_PORT) == 200
        poll(lambda: sum(map(is_open, silent)) < NUM_PROBES, 5, "room for a probe")
    assert probe(httpx.URL(limited.url).port or 0, "/docs") == 200


def test_too_few_open_files_are_told_in_one_line(tmp_path: Path) -> None:
    refused = ServiceProcess(
        tmp_path, module="tests.attacks.limited_service", variables={"NUM_FILES": "100"}, log_level="ERROR"
    )
    assert refused.wait() == 1
    assert "the limit of open files is 100" in refused.errors
    assert "ulimit -n" in refused.errors
    assert refused.errors.count("\n") == 1
