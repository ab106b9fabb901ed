"""Both tiers as one cache of embeddings by image digest."""

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from model import EmbeddingKind
from service.cache.lru import LruTier
from service.cache.redis_tier import RedisTier
from service.cache.wire import redis_key
from service.engine.image_pool import ComputedEmbedding
from service.model_backend import EncoderId

_BUDGET_S = 1.0  # that a request spends on Redis at most

Lookup = dict[str, dict[EmbeddingKind, Tensor]]  # by digest


class CacheCounter(Protocol):
    """Count one look-up: tier is "memory" or "redis", result as in `read_batcher.CacheRead`."""

    def __call__(self, tier: str, kind: EmbeddingKind, result: str) -> None: ...


class EmptyEmbedding(Protocol):
    """Return a tensor without storage that has the shape and dtype of the embeddings of one kind."""

    def __call__(self, kind: EmbeddingKind, encoder: EncoderId) -> Tensor: ...


class EmbeddingCache:
    """Read on the event loop before the request queue, written after the answer.

    fingerprint, preprocess_version: with the digest of the file they determine an embedding. expected: what
    an embedding in Redis must be like.
    """

    def __init__(
        self,
        memory: LruTier,
        redis: RedisTier | None,
        *,
        fingerprint: str,
        preprocess_version: str,
        expected: EmptyEmbedding,
        count: CacheCounter,
    ) -> None:
        self._memory = memory
        self._redis = redis
        self._fingerprint = fingerprint
        self._preprocess_version = preprocess_version
        self._expected = expected
        self._count = count

    async def lookup(
        self,
        digests: Sequence[str],
        required: frozenset[EmbeddingKind],
        encoder: EncoderId,
        *,
        is_bulk: bool = False,
    ) -> Lookup:
        """Look up what is required of images of one encoder, or else the features, to compute it from.

        is_bulk: for a request of many images, which reads no features from Redis: they would be too many.
        """
        found: Lookup = {digest: {} for digest in digests}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_BUDGET_S):
                for kind in sorted(required):
                    await self._look_up(kind, found, encoder, is_bulk)
                lacking = {digest: known for digest, known in found.items() if required - known.keys()}
                if lacking and EmbeddingKind.IMAGE_FEATURES not in required:
                    await self._look_up(EmbeddingKind.IMAGE_FEATURES, lacking, encoder, is_bulk)
        return found

    def store(self, computed: Iterable[ComputedEmbedding]) -> None:
        """Schedule writes to Redis; the engine has put the embeddings into this process's memory already."""
        if self._redis is not None:
            for embedding in computed:
                self._redis.put(self._key(embedding.digest, embedding.kind), embedding.tensor)

    async def _look_up(self, kind: EmbeddingKind, found: Lookup, encoder: EncoderId, is_bulk: bool) -> None:
        lacking = [
            digest for digest, known in found.items() if not self._get_local(digest, kind, known, is_bulk)
        ]
        if not lacking or self._redis is None or (is_bulk and kind is EmbeddingKind.IMAGE_FEATURES):
            return
        keys = [self._key(digest, kind) for digest in lacking]
        reads = await self._redis.get(kind, keys, self._expected(kind, encoder))
        for digest, read in zip(lacking, reads, strict=True):
            self._count("redis", kind, read.result)
            if read.tensor is not None:
                found[digest][kind] = read.tensor
                self._memory.put(digest, kind, read.tensor, is_bulk=is_bulk)

    def _get_local(
        self, digest: str, kind: EmbeddingKind, known: dict[EmbeddingKind, Tensor], is_bulk: bool
    ) -> bool:
        tensor = self._memory.get(digest, kind, is_bulk=is_bulk)
        self._count("memory", kind, "miss" if tensor is None else "hit")
        if tensor is not None:
            known[kind] = tensor
        return tensor is not None

    def _key(self, digest: str, kind: EmbeddingKind) -> str:
        return redis_key(
            digest=digest,
            fingerprint=self._fingerprint,
            preprocess_version=self._preprocess_version,
            kind=kind,
        )
