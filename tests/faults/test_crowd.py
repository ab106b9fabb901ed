"""Overload, clients that disconnect, and slow clients."""

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import httpx

from tests.faults.clients import ask, client_of, faulty_service, has, request
from tests.faults.faulty_device import HOLD
from tests.integration.processes import ServiceProcess, poll_async, service

CAPACITY, NUM_TOO_MANY, NUM_GONE, NUM_SLOW = 32, 8, 500, 50
IMAGES_SEEN = 'blip2_batch_rows_sum{stage="vision"}'
DISCONNECTED = 'blip2_abandoned_total{reason="disconnected"}'
LIMITS = {
    "stall_timeout_ms": 120_000,
    "max_waiting": CAPACITY,
    "max_images": 8,
    "max_questions": 8,
    "max_candidates": 8,
}

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def send(server: ServiceProcess, body: bytes, num_bytes: int | None = None) -> Connection:
    """Open a connection and send a request, or only the first bytes of its body."""
    url = httpx.URL(server.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(
        b"POST /caption HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    writer.write(body[:num_bytes])
    await writer.drain()
    return reader, writer


async def hang_up(connections: list[Connection]) -> None:
    for _, writer in connections:
        writer.close()
    for _, writer in connections:
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def shows(client: httpx.AsyncClient, *samples: str) -> Callable[[], Awaitable[bool]]:
    return partial(has, client, *samples)


async def test_beyond_its_capacity_exactly_the_surplus_is_shed(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    with faulty_service(tmp_path, model=random_checkpoint, **LIMITS) as held:
        async with client_of(held.url) as client:
            (tmp_path / HOLD).touch()
            holder = asyncio.create_task(ask(client, request(0)))
            await poll_async(shows(client, "blip2_running 1.0", "blip2_waiting 0.0"), 60)
            crowd = [
                asyncio.create_task(ask(client, request(seed)))
                for seed in range(1, CAPACITY + NUM_TOO_MANY + 1)
            ]
            overloaded = f'blip2_shed_total{{reason="overloaded"}} {NUM_TOO_MANY:.1f}'
            await poll_async(shows(client, f"blip2_waiting {CAPACITY:.1f}", overloaded), 60)
            (tmp_path / HOLD).unlink()
            answers = await asyncio.gather(holder, *crowd)
            shed = [answer for answer in answers if answer.status_code == 429]
            assert len(shed) == NUM_TOO_MANY
            assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in shed)
            assert [answer.status_code for answer in answers].count(200) == CAPACITY + 1
            await poll_async(shows(client, "blip2_waiting 0.0", "blip2_running 0.0"), 60)


async def test_clients_that_hang_up_in_the_queue_cost_the_device_nothing(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    with faulty_service(tmp_path, model=random_checkpoint, stall_timeout_ms=120_000) as held:
        async with client_of(held.url) as client:
            (tmp_path / HOLD).touch()
            num_seen = held.metric(IMAGES_SEEN)
            holder = asyncio.create_task(ask(client, request(0)))
            await poll_async(shows(client, "blip2_running 1.0"), 60)
            gone = [await send(held, json.dumps(request(seed)).encode()) for seed in range(1, NUM_GONE + 1)]
            await poll_async(shows(client, f"blip2_waiting {NUM_GONE:.1f}"), 120)
            await hang_up(gone)
            await poll_async(shows(client, "blip2_waiting 0.0", f"{DISCONNECTED} {NUM_GONE:.1f}"), 60)
            (tmp_path / HOLD).unlink()
            assert (await holder).status_code == 200
            assert (await ask(client, request(NUM_GONE + 1))).status_code == 200
            await poll_async(shows(client, "blip2_running 0.0"), 60)
        assert held.metric(IMAGES_SEEN) == num_seen + 2


async def test_slow_clients_hold_up_nobody_and_not_the_end_either(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    with service(tmp_path, model=random_checkpoint, drain_timeout_ms=60_000) as server:
        body = json.dumps(request(0)).encode()
        slow = [await send(server, body, len(body) // 2) for _ in range(NUM_SLOW)]
        async with client_of(server.url) as client:
            answers = await asyncio.gather(*(ask(client, request(seed)) for seed in range(8)))
            assert [answer.status_code for answer in answers] == [200] * 8
            assert await has(client, "blip2_waiting 0.0")  # an incomplete request is not in the queue
        reader, writer = slow[0]
        writer.write(body[len(body) // 2 :])
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        terminated_s = time.monotonic()
        server.terminate()
        reader, _ = slow[1]
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        assert head.startswith("http/1.1 503")
        assert "connection: close" in head
        assert re.search(r"retry-after: \d+", head)
        assert server.wait() == 0
        assert time.monotonic() - terminated_s < 30
        await hang_up(slow)
