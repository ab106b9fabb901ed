"""The second tier: tensors in Redis, shared by all replicas. Fails open: whatever goes wrong is a miss."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context

from torch import Tensor

from model import EmbeddingKind
from service.cache.breaker import CircuitBreaker
from service.cache.read_batcher import FAILED, CacheRead, ReadBatcher
from service.cache.redis_store import ByteStore, RefusedError, StoreError
from service.cache.wire import WireError, pack, unpack

logger = logging.getLogger(__name__)

_KEYS_PER_READ, _MAX_READS = 32, 2
_LARGE = frozenset({EmbeddingKind.IMAGE_FEATURES})  # a megabyte each: faster one by one, several at once
_MAX_LARGE_READS = 8
_READ_BUDGET_S = 1.0
_VALUES_PER_WRITE = 8
_MAX_WAITING_BYTES = 64 * 2**20


class RedisTier:
    """Reads on the event loop; writes after the answers, in a task of its own, and drops any excess.

    An entry that is corrupt, or not like the embeddings of this model, counts as an error and is deleted.

    count_writes(result, number of values) is called with the result of each write: written, refused (Redis is
    full or read-only), error, skipped (the breaker is open) or dropped (too many bytes waited).
    """

    def __init__(
        self,
        store: ByteStore,
        breaker: CircuitBreaker,
        *,
        ttl_s: int,
        count_writes: Callable[[str, int], None] = lambda _result, _count: None,
    ) -> None:
        self._store = store
        self._breaker = breaker
        self._ttl_s = ttl_s
        self._count_writes = count_writes
        self._small = ReadBatcher(
            self._read, per_read=_KEYS_PER_READ, max_reads=_MAX_READS, budget_s=_READ_BUDGET_S
        )
        self._large = ReadBatcher(self._read, per_read=1, max_reads=_MAX_LARGE_READS, budget_s=_READ_BUDGET_S)
        self._waiting: deque[tuple[str, Tensor]] = deque()
        self._unusable: list[str] = []  # keys to delete
        self._waiting_bytes = 0
        self._writer: asyncio.Task[None] | None = None
        self._is_refused = False
        self._last_error = ""

    @property
    def breaker_open(self) -> bool:
        return self._breaker.is_open

    async def ping(self) -> None:
        """Log a warning where Redis cannot be used; it is used all the same, as soon as it can."""
        (read,) = await self._small.get(["blip2:greeting"])
        if read.result == "error":
            logger.warning(
                "Redis %s; meanwhile embeddings are kept in this process alone",
                self._last_error or "does not answer",
            )

    async def get(self, kind: EmbeddingKind, keys: Sequence[str], expected: Tensor) -> list[CacheRead]:
        """Read values of one kind within a second, batched with the reads of other requests.

        expected: a tensor of the shape and dtype of this kind, for instance on the device "meta".
        """
        reads = await (self._large if kind in _LARGE else self._small).get(keys)
        return [self._check(key, read, expected) for key, read in zip(keys, reads, strict=True)]

    def put(self, key: str, tensor: Tensor) -> None:
        """Schedule a tensor to be written; drop it where too many bytes wait already."""
        if self._waiting_bytes + tensor.nbytes > _MAX_WAITING_BYTES:
            self._count_writes("dropped", 1)
            return
        self._waiting.append((key, tensor))
        self._waiting_bytes += tensor.nbytes
        self._start_writer()

    async def aclose(self, timeout_s: float) -> None:
        """Write what waits, within the time-out, and close the store."""
        if self._writer is not None:
            await asyncio.wait([self._writer], timeout=timeout_s)
            self._writer.cancel()
        await self._small.aclose()
        await self._large.aclose()
        await self._store.aclose()

    def _check(self, key: str, read: CacheRead, expected: Tensor) -> CacheRead:
        problem = read.problem or (read.tensor is not None and _difference(read.tensor, expected))
        if not problem:
            return read
        logger.warning("an entry in Redis is not used and is deleted: %s", problem)
        self._unusable.append(key)
        self._start_writer()
        return FAILED

    async def _read(self, keys: Sequence[str]) -> list[CacheRead]:
        if not self._breaker.allow():
            return [CacheRead(None, "skipped")] * len(keys)
        try:
            async with asyncio.timeout(_READ_BUDGET_S):
                values = await self._store.get_many(keys)
        except (StoreError, TimeoutError) as exc:
            self._report_failure(exc)
            return [FAILED] * len(keys)
        except BaseException:
            self._breaker.abandoned()
            raise
        self._report_success()
        return [_read_value(key, value) for key, value in zip(keys, values, strict=True)]

    def _start_writer(self) -> None:
        if self._writer is None or self._writer.done():
            # It serves many requests: the context of the first must not be that of its log lines.
            self._writer = asyncio.create_task(self._write_all(), name="redis-writer", context=Context())

    async def _write_all(self) -> None:
        while self._unusable or self._waiting:
            keys, self._unusable = self._unusable, []
            if keys:  # first, or it would delete what replaces an entry
                await self._change(self._store.delete_many, keys)
            batch = [self._waiting.popleft() for _ in range(min(_VALUES_PER_WRITE, len(self._waiting)))]
            self._waiting_bytes -= sum(tensor.nbytes for _, tensor in batch)
            if batch:
                values = {key: pack(key, tensor) for key, tensor in batch}
                self._count_writes(await self._change(self._store.set_many, values, self._ttl_s), len(batch))

    async def _change(self, change: Callable[..., Awaitable[None]], *args: object) -> str:
        if not self._breaker.allow():
            return "skipped"
        try:
            await change(*args)
        except RefusedError as exc:
            self._report_success()  # it answers, and what it holds can be read
            self._report_refusal(exc)
            return "refused"
        except StoreError as exc:
            self._report_failure(exc)
            return "error"
        except BaseException:
            self._breaker.abandoned()
            raise
        self._report_success()
        self._is_refused = False
        return "written"

    def _report_refusal(self, error: RefusedError) -> None:
        if not self._is_refused:
            logger.warning("Redis refuses writes; reads go on: %s", error)
        self._is_refused = True

    def _report_success(self) -> None:
        if self._breaker.is_open:
            logger.info("Redis answers again")
        self._breaker.succeeded()

    def _report_failure(self, error: Exception) -> None:
        was_open, self._last_error = self._breaker.is_open, str(error) or "does not answer in time"
        self._breaker.failed()
        if self._breaker.is_open and not was_open:
            logger.warning("the circuit breaker keeps Redis out for a while: it %s", self._last_error)


def _read_value(key: str, value: bytes | None) -> CacheRead:
    if value is None:
        return CacheRead(None, "miss")
    try:
        return CacheRead(unpack(key, value), "hit")
    except WireError as exc:
        return CacheRead(None, "error", problem=str(exc))


def _difference(tensor: Tensor, expected: Tensor) -> str:
    """Return why a tensor cannot be an embedding like the expected one; "" if it can."""
    if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
        return (
            f"it is {list(tensor.shape)} of {tensor.dtype}, and this model's are {list(expected.shape)} of "
            f"{expected.dtype}"
        )
    return "" if bool(tensor.isfinite().all()) else "it holds numbers that are not finite"
