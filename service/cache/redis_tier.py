"""The second level: tensors in Redis, shared by all replicas. Fails open: whatever goes wrong is a miss."""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from service.cache.breaker import CircuitBreaker
from service.cache.redis_store import ByteStore, StoreError
from service.cache.wire import WireError, pack, unpack
from service.jobs import Kind

logger = logging.getLogger(__name__)

_KEYS_PER_READ = {Kind.QUERY_OUTPUT: 32, Kind.IMAGE_EMBEDS: 32, Kind.IMAGE_FEATURES: 1}  # by their size
_MAX_READS = 8
_READ_BUDGET_S = 1.0  # for all reads of one request
_VALUES_PER_WRITE = 8
_MAX_WAITING_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Read:
    """result: hit, miss, error (Redis failed, or the entry is corrupt), or skipped (the breaker is open)."""

    tensor: Tensor | None
    result: str


class RedisTier:
    """Reads on the event loop; writes behind the answers, in a task of its own, dropping what is too much."""

    def __init__(self, store: ByteStore, breaker: CircuitBreaker, *, ttl_s: int) -> None:
        self._store = store
        self._breaker = breaker
        self._ttl_s = ttl_s
        self._reads = asyncio.Semaphore(_MAX_READS)
        self._waiting: deque[tuple[str, Tensor]] = deque()
        self._waiting_bytes = 0
        self._writer: asyncio.Task[None] | None = None

    @property
    def breaker_open(self) -> bool:
        return self._breaker.is_open

    async def get(self, kind: Kind, keys: Sequence[str]) -> list[Read]:
        """Reads so many of one kind, within a second."""
        step = _KEYS_PER_READ[kind]
        chunks = [keys[start : start + step] for start in range(0, len(keys), step)]
        reads: list[list[Read]] = [[Read(None, "error")] * len(chunk) for chunk in chunks]

        async def read(index: int) -> None:
            async with self._reads:
                reads[index] = await self._read(chunks[index])

        try:
            async with asyncio.timeout(_READ_BUDGET_S), asyncio.TaskGroup() as group:
                for index in range(len(chunks)):
                    group.create_task(read(index))
        except TimeoutError:
            logger.warning("Redis took more than %s s for one request", _READ_BUDGET_S)
        return [read for chunk in reads for read in chunk]

    def put(self, key: str, tensor: Tensor) -> None:
        """Has a tensor written soon; drops it where too many wait already."""
        if self._waiting_bytes + tensor.nbytes > _MAX_WAITING_BYTES:
            return
        self._waiting.append((key, tensor))
        self._waiting_bytes += tensor.nbytes
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_all(), name="redis-writer")

    async def aclose(self, timeout_s: float) -> None:
        """Writes what waits, for so long at most, and closes the store."""
        if self._writer is not None:
            await asyncio.wait([self._writer], timeout=timeout_s)
            self._writer.cancel()
        await self._store.aclose()

    async def _read(self, keys: Sequence[str]) -> list[Read]:
        if not self._breaker.allow():
            return [Read(None, "skipped")] * len(keys)
        try:
            values = await self._store.get_many(keys)
        except StoreError as exc:
            self._failed(exc)
            return [Read(None, "error")] * len(keys)
        except asyncio.CancelledError:
            self._breaker.abandoned()
            raise
        self._succeeded()
        return [_read_value(value) for value in values]

    async def _write_all(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(_VALUES_PER_WRITE, len(self._waiting)))]
            self._waiting_bytes -= sum(tensor.nbytes for _, tensor in batch)
            if not self._breaker.allow():
                continue
            try:
                await self._store.set_many({key: pack(tensor) for key, tensor in batch}, self._ttl_s)
            except StoreError as exc:
                self._failed(exc)
            except asyncio.CancelledError:
                self._breaker.abandoned()
                raise
            else:
                self._succeeded()

    def _succeeded(self) -> None:
        if self._breaker.is_open:
            logger.info("Redis answers again")
        self._breaker.succeeded()

    def _failed(self, error: StoreError) -> None:
        was_open = self._breaker.is_open
        self._breaker.failed()
        if self._breaker.is_open and not was_open:
            logger.warning("Redis is left alone for a while, for it fails: %s", error)


def _read_value(value: bytes | None) -> Read:
    if value is None:
        return Read(None, "miss")
    try:
        return Read(unpack(value), "hit")
    except WireError as exc:
        logger.warning("an entry in Redis is not used: %s", exc)
        return Read(None, "error")
