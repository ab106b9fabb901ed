"""Batches the reads of many callers: keys requested while a read runs go into the next one."""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class CacheRead:
    """result: hit, miss, error (Redis failed, or the entry is corrupt), or skipped (the breaker is open).

    problem: why the entry is corrupt; "" where it is not.
    """

    tensor: Tensor | None
    result: str
    problem: str = ""


FAILED = CacheRead(None, "error")

ReadMany = Callable[[Sequence[str]], Awaitable[Sequence[CacheRead]]]


@dataclass(frozen=True, slots=True)
class PendingKey:
    """One key, and the future of its value."""

    key: str
    value: asyncio.Future[CacheRead]


class ReadBatcher:
    """For the event loop. read_many: reads up to `per_read` keys in one round trip, and raises nothing.

    max_reads: round trips at once. budget_s: how long a caller waits at most.
    """

    def __init__(self, read_many: ReadMany, *, per_read: int, max_reads: int, budget_s: float) -> None:
        self._read_many = read_many
        self._per_read = per_read
        self._max_reads = max_reads
        self._budget_s = budget_s
        self._pending: deque[PendingKey] = deque()
        self._readers: set[asyncio.Task[None]] = set()
        self._num_readers = 0  # that still take keys: a task outlives its last read by a moment

    async def get(self, keys: Sequence[str]) -> list[CacheRead]:
        """Read one key or more; a value that has not arrived within the budget is an error."""
        loop = asyncio.get_running_loop()
        pending_keys = [PendingKey(key, loop.create_future()) for key in keys]
        self._pending.extend(pending_keys)
        self._start_readers()
        try:
            await asyncio.wait([pending.value for pending in pending_keys], timeout=self._budget_s)
        finally:
            for pending in pending_keys:
                pending.value.cancel()  # does nothing to those that are read
        return [FAILED if pending.value.cancelled() else pending.value.result() for pending in pending_keys]

    async def aclose(self) -> None:
        """Cancel the reads under way."""
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    def _start_readers(self) -> None:
        num_needed = math.ceil(len(self._pending) / self._per_read)
        for _ in range(min(num_needed, self._max_reads - self._num_readers)):
            self._num_readers += 1
            # It serves many requests: the context of the first must not be that of its log lines.
            reader = asyncio.create_task(self._read_all(), name="redis-reader", context=Context())
            self._readers.add(reader)
            reader.add_done_callback(self._readers.discard)

    async def _read_all(self) -> None:
        try:
            while pending_keys := self._next_batch():
                reads = await self._read_many([pending.key for pending in pending_keys])
                for pending, read in zip(pending_keys, reads, strict=True):
                    if not pending.value.done():
                        pending.value.set_result(read)
        finally:
            self._num_readers -= 1

    def _next_batch(self) -> list[PendingKey]:
        pending_keys: list[PendingKey] = []
        while self._pending and len(pending_keys) < self._per_read:
            pending = self._pending.popleft()
            if not pending.value.done():  # its caller may have gone
                pending_keys.append(pending)
        return pending_keys
