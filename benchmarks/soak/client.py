"""Concurrent clients that send the traffic, and the counts of its outcomes."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx

from benchmarks.soak.traffic import Traffic, TrafficRequest

_CLIENT_TIMEOUT_S = 120.0
_SHED = (429, 503)
_EXPIRED = 504
_MAX_UNEXPECTED = 20


@dataclass(slots=True)
class Tally:
    """Counts of requests by outcome; unexpected: descriptions of responses with an unexpected status."""

    sent: int = 0
    abandoned: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)

    @property
    def answered(self) -> int:
        return self.statuses[200]

    @property
    def refused(self) -> int:
        return sum(count for status, count in self.statuses.items() if 400 <= status < 500 and status != 429)

    @property
    def shed(self) -> int:
        return sum(self.statuses[status] for status in _SHED)

    @property
    def expired(self) -> int:
        return self.statuses[_EXPIRED]

    @property
    def adds_up(self) -> bool:
        return self.sent == self.answered + self.refused + self.shed + self.expired + self.abandoned

    def count(self, request: TrafficRequest, response: httpx.Response) -> None:
        status = response.status_code
        self.statuses[status] += 1
        may_expire = request.timeout_ms is not None and status == _EXPIRED
        is_unexpected = status != request.expected and status not in _SHED and not may_expire
        if is_unexpected and len(self.unexpected) < _MAX_UNEXPECTED:
            self.unexpected.append(
                f"{request.path}: {status} where {request.expected} was expected: {response.text[:200]}"
            )


async def send_for(url: str, traffic: Traffic, tally: Tally, *, num_workers: int, seconds: float) -> None:
    """Send traffic with `num_workers` workers for `seconds`, and wait for the last responses."""
    until = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=num_workers)
    async with httpx.AsyncClient(
        base_url=url, timeout=_CLIENT_TIMEOUT_S, limits=limits, trust_env=False
    ) as client:

        async def work() -> None:
            while time.monotonic() < until:
                await asyncio.gather(*(_run(client, request, tally) for request in traffic.draw()))

        async with asyncio.TaskGroup() as group:
            for _ in range(num_workers):
                group.create_task(work())


async def _run(client: httpx.AsyncClient, request: TrafficRequest, tally: Tally) -> None:
    tally.sent += 1
    if request.disconnect_s is not None:
        await _disconnect(client.base_url, request, request.disconnect_s)
        tally.abandoned += 1
        return
    headers = {"Content-Type": request.content_type}
    if request.timeout_ms is not None:
        headers["X-Request-Timeout-Ms"] = str(request.timeout_ms)
    tally.count(request, await client.post(request.path, content=request.body, headers=headers))


async def _disconnect(url: httpx.URL, request: TrafficRequest, after_s: float) -> None:
    """Send the body or half of it, and close the connection without reading the response."""
    assert url.port is not None
    _, writer = await asyncio.open_connection(url.host, url.port)
    head = (
        f"POST {request.path} HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: {request.content_type}\r\n"
        f"Content-Length: {len(request.body)}\r\n\r\n"
    )
    body = request.body[: len(request.body) // 2] if request.sends_half else request.body
    writer.write(head.encode() + body)
    await writer.drain()
    await asyncio.sleep(after_s)
    writer.close()
    await writer.wait_closed()
