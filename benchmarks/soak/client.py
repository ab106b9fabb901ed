"""Workers that run errands one after the other, and the account of what became of them."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx

from benchmarks.soak.traffic import Errand, Errands

_CLIENT_TIMEOUT_S = 120.0
_SHED = (429, 503)
_EXPIRED = 504
_MAX_SURPRISES = 20


@dataclass(slots=True)
class Tally:
    """What was sent, and what came of it. surprises: answers that should not have been, in words."""

    sent: int = 0
    abandoned: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    surprises: list[str] = field(default_factory=list)

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

    def count(self, errand: Errand, response: httpx.Response) -> None:
        status = response.status_code
        self.statuses[status] += 1
        may_expire = errand.timeout_ms is not None and status == _EXPIRED
        is_surprise = status != errand.expected and status not in _SHED and not may_expire
        if is_surprise and len(self.surprises) < _MAX_SURPRISES:
            self.surprises.append(
                f"{errand.path}: {status} where {errand.expected} was due: {response.text[:200]}"
            )


async def send_for(url: str, errands: Errands, tally: Tally, *, num_workers: int, seconds: float) -> None:
    """Has so many workers send for so long, and waits for the last of their answers."""
    until = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=num_workers)
    async with httpx.AsyncClient(
        base_url=url, timeout=_CLIENT_TIMEOUT_S, limits=limits, trust_env=False
    ) as client:

        async def work() -> None:
            while time.monotonic() < until:
                await asyncio.gather(*(_run(client, errand, tally) for errand in errands.draw()))

        async with asyncio.TaskGroup() as group:
            for _ in range(num_workers):
                group.create_task(work())


async def _run(client: httpx.AsyncClient, errand: Errand, tally: Tally) -> None:
    tally.sent += 1
    if errand.hang_up_s is not None:
        await _hang_up(client.base_url, errand, errand.hang_up_s)
        tally.abandoned += 1
        return
    headers = {"Content-Type": errand.content_type}
    if errand.timeout_ms is not None:
        headers["X-Request-Timeout-Ms"] = str(errand.timeout_ms)
    tally.count(errand, await client.post(errand.path, content=errand.body, headers=headers))


async def _hang_up(url: httpx.URL, errand: Errand, after_s: float) -> None:
    """Sends the whole or half of the body, and closes the connection without reading."""
    assert url.port is not None
    _, writer = await asyncio.open_connection(url.host, url.port)
    head = (
        f"POST {errand.path} HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: {errand.content_type}\r\n"
        f"Content-Length: {len(errand.body)}\r\n\r\n"
    )
    body = errand.body[: len(errand.body) // 2] if errand.half else errand.body
    writer.write(head.encode() + body)
    await writer.drain()
    await asyncio.sleep(after_s)
    writer.close()
    await writer.wait_closed()
