"""Reads of many callers, together: what is asked for while reads are under way goes into the next one."""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Read:
    """result: hit, miss, error (Redis failed, or the entry is corrupt), or skipped (the breaker is open)."""

    tensor: Tensor | None
    result: str


FAILED = Read(None, "error")

ReadMany = Callable[[Sequence[str]], Awaitable[Sequence[Read]]]


@dataclass(frozen=True, slots=True)
class Wish:
    """One key, and where its value is awaited."""

    key: str
    read: asyncio.Future[Read]


class ReadLine:
    """For the event loop. read_many: reads up to `per_read` keys in one round trip, and raises nothing.

    max_reads: round trips at once. budget_s: how long a caller waits at most.
    """

    def __init__(self, read_many: ReadMany, *, per_read: int, max_reads: int, budget_s: float) -> None:
        self._read_many = read_many
        self._per_read = per_read
        self._max_reads = max_reads
        self._budget_s = budget_s
        self._wishes: deque[Wish] = deque()
        self._readers: set[asyncio.Task[None]] = set()
        self._num_readers = 0  # that look for wishes: a task outlives its last look by a moment

    async def get(self, keys: Sequence[str]) -> list[Read]:
        """Reads one key or more; what is not there when the time is up is an error."""
        loop = asyncio.get_running_loop()
        wishes = [Wish(key, loop.create_future()) for key in keys]
        self._wishes.extend(wishes)
        self._start_readers()
        try:
            await asyncio.wait([wish.read for wish in wishes], timeout=self._budget_s)
        finally:
            for wish in wishes:
                wish.read.cancel()  # does nothing to those that are read
        return [FAILED if wish.read.cancelled() else wish.read.result() for wish in wishes]

    async def aclose(self) -> None:
        """Gives up what is under way."""
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    def _start_readers(self) -> None:
        wanted = math.ceil(len(self._wishes) / self._per_read)
        for _ in range(min(wanted, self._max_reads - self._num_readers)):
            self._num_readers += 1
            reader = asyncio.create_task(self._read_all(), name="redis-reader")
            self._readers.add(reader)
            reader.add_done_callback(self._readers.discard)

    async def _read_all(self) -> None:
        try:
            while wishes := self._next_wishes():
                reads = await self._read_many([wish.key for wish in wishes])
                for wish, read in zip(wishes, reads, strict=True):
                    if not wish.read.done():
                        wish.read.set_result(read)
        finally:
            self._num_readers -= 1

    def _next_wishes(self) -> list[Wish]:
        wishes: list[Wish] = []
        while self._wishes and len(wishes) < self._per_read:
            wish = self._wishes.popleft()
            if not wish.read.done():  # its caller may have gone
                wishes.append(wish)
        return wishes
