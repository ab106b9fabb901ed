"""Uploads that do not end, trickle, or wait for the device: bounded in bytes and time; others are served."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest

from benchmarks.process_memory import own_bytes
from tests.attacks.harness import MemoryWatch, bystander
from tests.attacks.raw_http import connected, head, read_all, read_status
from tests.faults.clients import faulty_service
from tests.faults.faulty_device import HOLD
from tests.integration.pictures import in_base64, picture
from tests.integration.processes import ServiceProcess, poll, service

pytestmark = pytest.mark.serial

MEGABYTE = 2**20
NUM_UPLOADS, UPLOAD_BYTES = 40, 58 * MEGABYTE
BUDGET_BYTES = 128 * MEGABYTE  # the default
SLACK_BYTES = 100 * MEGABYTE  # what was sent and not yet read, and captions
UPLOAD_TIMEOUT_S = 2.0
UPLOAD_GAUGE = "blip2_upload_bytes"


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    timeout_ms = int(UPLOAD_TIMEOUT_S * 1000)
    with service(tmp_path_factory.mktemp("impatient"), upload_timeout_ms=timeout_ms) as started:
        yield started


def test_forty_unfinished_uploads_take_no_more_than_the_budget(attacked: ServiceProcess) -> None:
    """Each sends all but the end of its body, and keeps the connection."""
    statuses: list[int | None] = []
    body = b'{"image":"' + b"A" * (UPLOAD_BYTES - 100)

    def upload(stack: ExitStack) -> None:
        connection = stack.enter_context(connected(attacked))
        with contextlib.suppress(ConnectionError):  # it is not read to its end
            connection.sendall(head("/caption", UPLOAD_BYTES) + body)
        connection.settimeout(1)
        with contextlib.suppress(TimeoutError):  # of those that still arrive
            statuses.append(read_status(connection))

    with bystander(attacked), MemoryWatch(attacked) as memory, ExitStack() as stack:
        threads = [threading.Thread(target=upload, args=(stack,)) for _ in range(NUM_UPLOADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert attacked.metric(UPLOAD_GAUGE) <= BUDGET_BYTES
    assert memory.growth_bytes < BUDGET_BYTES + SLACK_BYTES
    assert statuses.count(429) >= NUM_UPLOADS - 2 * (BUDGET_BYTES // UPLOAD_BYTES) - 2
    poll(lambda: attacked.metric(UPLOAD_GAUGE) == 0, 10, "the end of all uploads")


def test_a_new_upload_displaces_the_slowest_of_those_that_fill_the_share_of_their_caller(
    attacked: ServiceProcess,
) -> None:
    half, quarter = (
        BUDGET_BYTES // 2,
        BUDGET_BYTES // 4,
    )  # the last quarter is left to others and to small bodies
    body = json.dumps({"image": in_base64(picture(0)), "num_beams": 1}).encode() + b" " * 2 * MEGABYTE
    with connected(attacked) as slow, connected(attacked) as slower:
        slow.sendall(head("/caption", half) + b" " * MEGABYTE)
        slower.sendall(head("/caption", quarter) + b" ")
        poll(lambda: attacked.metric(UPLOAD_GAUGE) == half + quarter, 10, "both")

        def is_served() -> bool:
            return httpx.post(f"{attacked.url}/caption", content=body, timeout=30).status_code == 200

        poll(is_served, 5, "room for a third upload")  # within the second that both are left alone, it is 429
        assert read_status(slower) == 429
        assert attacked.metric(UPLOAD_GAUGE) == half


@pytest.mark.parametrize(
    ("headers", "status", "limit_s"),
    [((), 408, UPLOAD_TIMEOUT_S), (("X-Request-Timeout-Ms: 500",), 504, 0.5)],
    ids=["by our limit", "by the caller's deadline"],
)
def test_an_upload_that_trickles_ends_in_time(
    impatient: ServiceProcess, headers: tuple[str, ...], status: int, limit_s: float
) -> None:
    with connected(impatient) as connection:
        started = time.monotonic()
        connection.sendall(head("/caption", 1000, *headers))
        connection.settimeout(0.1)
        answer = b""
        while not answer and time.monotonic() - started < limit_s + 5:
            connection.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(12)
        assert answer == b"HTTP/1.1 %d" % status
        assert limit_s <= time.monotonic() - started < limit_s + 1
        connection.settimeout(5)
        if status == 408:  # the connection ends too, or reading would not
            assert b'"code":"request_timeout"' in read_all(connection)


def test_a_request_that_waits_for_the_device_holds_no_file(tmp_path: Path) -> None:
    """Thirty files of 6 MB are 240 MB of base64, and far less in pixels: much follows the end of each.

    Processes that decode come and go, and keep memory of their own: it does not count.
    """
    num_requests, padding = 30, bytes(6 * MEGABYTE)
    with faulty_service(tmp_path, model="tiny", stall_timeout_ms=120_000, max_upload_bytes=2**30) as held:
        (tmp_path / HOLD).touch()
        before_bytes = own_bytes(held.process.pid)
        with ExitStack() as stack:
            for index in range(num_requests):
                body = b'{"image": "%s"}' % in_base64(picture(index) + padding).encode()
                connection = stack.enter_context(connected(held))
                connection.sendall(head("/caption", len(body)) + body)
            poll(lambda: held.total("blip2_waiting") + held.total("blip2_running") == num_requests, 60, "all")
            poll(lambda: held.metric(UPLOAD_GAUGE) == 0, 60, "the files to be dropped")

            def growth_bytes() -> int:
                return own_bytes(held.process.pid) - before_bytes

            # Free memory goes back to the system every 15 s.
            poll(lambda: growth_bytes() < 100 * MEGABYTE, 30, "memory without the files")
        (tmp_path / HOLD).unlink()


def test_a_budget_is_free_again_after_every_kind_of_end(attacked: ServiceProcess) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        with connected(attacked) as connection:
            body = json.dumps({"image": in_base64(picture(int(rng.integers(99))))}).encode()
            body = bytes(rng.permutation(np.frombuffer(body, np.uint8))) if rng.random() < 0.5 else body
            connection.sendall(head("/caption", len(body)) + body[: int(rng.integers(1, len(body) + 1))])
    poll(lambda: attacked.metric(UPLOAD_GAUGE) == 0, 10, "an empty budget")
