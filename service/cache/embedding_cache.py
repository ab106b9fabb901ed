"""Both levels as one cache of encodings by image digest."""

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from service.cache.lru import MemoryCache
from service.cache.redis_tier import RedisTier
from service.cache.wire import redis_key
from service.engine.request import FreshEncoding, Kind

_BUDGET_S = 1.0  # what a request loses to Redis at most

Lookup = dict[str, dict[Kind, Tensor]]  # by digest


class CacheCounter(Protocol):
    """Is told of every look-up: tier is "memory" or "redis", result as in `redis_tier.Read`."""

    def __call__(self, tier: str, kind: Kind, result: str) -> None: ...


class EmbeddingCache:
    """Read on the event loop before the line, written after the answer.

    fingerprint, preprocess_version: what, beside the image file, decides an encoding.
    count: see CacheCounter.
    """

    def __init__(
        self,
        memory: MemoryCache,
        redis: RedisTier | None,
        *,
        fingerprint: str,
        preprocess_version: str,
        count: CacheCounter,
    ) -> None:
        self._memory = memory
        self._redis = redis
        self._fingerprint = fingerprint
        self._preprocess_version = preprocess_version
        self._count = count

    async def lookup(self, digests: Sequence[str], needs: frozenset[Kind]) -> Lookup:
        """Gives what is known of each image: of what is needed, else the image features, to make it from."""
        found: Lookup = {digest: {} for digest in digests}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_BUDGET_S):
                await self._look_for_all(found, needs)
        return found

    async def _look_for_all(self, found: Lookup, needs: frozenset[Kind]) -> None:
        for kind in sorted(needs):
            await self._look_for(kind, found)
        lacking = {digest: known for digest, known in found.items() if needs - known.keys()}
        if lacking and Kind.IMAGE_FEATURES not in needs:
            await self._look_for(Kind.IMAGE_FEATURES, lacking)

    def store(self, fresh: Iterable[FreshEncoding]) -> None:
        """Has them written to Redis soon; the engine has put them into this process's memory already."""
        if self._redis is not None:
            for encoding in fresh:
                self._redis.put(self._key(encoding.digest, encoding.kind), encoding.tensor)

    async def _look_for(self, kind: Kind, found: Lookup) -> None:
        lacking = [digest for digest, known in found.items() if not self._recall(digest, kind, known)]
        if not lacking or self._redis is None:
            return
        reads = await self._redis.get(kind, [self._key(digest, kind) for digest in lacking])
        for digest, read in zip(lacking, reads, strict=True):
            self._count("redis", kind, read.result)
            if read.tensor is not None:
                found[digest][kind] = read.tensor
                self._memory.put(digest, kind, read.tensor)

    def _recall(self, digest: str, kind: Kind, known: dict[Kind, Tensor]) -> bool:
        tensor = self._memory.get(digest, kind)
        self._count("memory", kind, "miss" if tensor is None else "hit")
        if tensor is not None:
            known[kind] = tensor
        return tensor is not None

    def _key(self, digest: str, kind: Kind) -> str:
        return redis_key(
            digest=digest,
            fingerprint=self._fingerprint,
            preprocess_version=self._preprocess_version,
            kind=kind,
        )
