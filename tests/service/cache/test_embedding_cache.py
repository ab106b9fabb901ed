"""Both levels together: what is asked of which, in which order."""

import torch

from model import EmbeddingKind
from service.cache.breaker import CircuitBreaker
from service.cache.embedding_cache import EmbeddingCache
from service.cache.lru import LruTier
from service.cache.redis_tier import RedisTier
from service.engine.image_pool import ComputedEmbedding
from service.model_backend import EncoderId
from tests.service.cache.test_redis_tier import FakeStore

QUERIES = frozenset({EmbeddingKind.QUERY_OUTPUT})
MATCHING = frozenset({EmbeddingKind.IMAGE_EMBEDS, EmbeddingKind.IMAGE_FEATURES})


class Bench:
    """A cache, its store, and what was counted."""

    def __init__(self, store: FakeStore | None, *, cache_bytes: int = 2**20, fingerprint: str = "f") -> None:
        self.counts: list[tuple[str, EmbeddingKind, str]] = []
        self.memory = LruTier(cache_bytes)
        self.redis = None if store is None else RedisTier(store, CircuitBreaker(), ttl_s=60)
        self.cache = EmbeddingCache(
            self.memory,
            self.redis,
            fingerprint=fingerprint,
            preprocess_version="1",
            expected=lambda kind, encoder: torch.empty(2, device="meta"),
            count=lambda tier, kind, result: self.counts.append((tier, kind, result)),
        )

    async def store_one(self, digest: str, kind: EmbeddingKind, value: float) -> None:
        self.cache.store([ComputedEmbedding(digest, kind, torch.full((2,), value))])
        assert self.redis is not None
        await self.redis.aclose(5)


async def test_without_redis_only_memory_is_asked() -> None:
    bench = Bench(None)
    bench.memory.put("a", EmbeddingKind.QUERY_OUTPUT, torch.ones(2))
    found = await bench.cache.lookup(["a", "b"], QUERIES, EncoderId.MAIN)
    assert found["a"].keys() == {EmbeddingKind.QUERY_OUTPUT}
    assert found["b"] == {}
    bench.cache.store(
        [ComputedEmbedding("a", EmbeddingKind.QUERY_OUTPUT, torch.ones(2))]
    )  # has nowhere to go


async def test_what_redis_knows_is_remembered_in_memory() -> None:
    store = FakeStore()
    await Bench(store).store_one("a", EmbeddingKind.QUERY_OUTPUT, 3.0)
    replica = Bench(store)
    for _ in range(2):
        found = await replica.cache.lookup(["a"], QUERIES, EncoderId.MAIN)
        assert found["a"][EmbeddingKind.QUERY_OUTPUT].tolist() == [3, 3]
    assert store.reads == [1]
    assert replica.counts == [
        ("memory", EmbeddingKind.QUERY_OUTPUT, "miss"),
        ("redis", EmbeddingKind.QUERY_OUTPUT, "hit"),
        ("memory", EmbeddingKind.QUERY_OUTPUT, "hit"),
    ]


async def test_another_model_never_gets_a_false_hit() -> None:
    store = FakeStore()
    await Bench(store).store_one("a", EmbeddingKind.QUERY_OUTPUT, 3.0)
    assert (await Bench(store, fingerprint="g").cache.lookup(["a"], QUERIES, EncoderId.MAIN))["a"] == {}


async def test_image_features_stand_in_where_the_query_output_is_unknown() -> None:
    store = FakeStore()
    await Bench(store).store_one("a", EmbeddingKind.IMAGE_FEATURES, 5.0)
    found = await Bench(store).cache.lookup(["a", "b"], QUERIES, EncoderId.MAIN)
    assert found["a"].keys() == {EmbeddingKind.IMAGE_FEATURES}
    assert found["b"] == {}


async def test_image_features_are_not_fetched_where_they_are_not_needed() -> None:
    store = FakeStore()
    await Bench(store).store_one("a", EmbeddingKind.QUERY_OUTPUT, 3.0)
    store.reads.clear()
    await Bench(store).cache.lookup(["a"], QUERIES, EncoderId.MAIN)
    assert store.reads == [1]


async def test_matching_asks_for_both_kinds() -> None:
    store = FakeStore()
    await Bench(store).store_one("a", EmbeddingKind.IMAGE_FEATURES, 5.0)
    await Bench(store).store_one("a", EmbeddingKind.IMAGE_EMBEDS, 6.0)
    found = await Bench(store).cache.lookup(["a"], MATCHING, EncoderId.MAIN)
    assert found["a"].keys() == MATCHING


async def test_an_image_that_is_asked_for_twice_is_looked_up_once() -> None:
    store = FakeStore()
    await Bench(store).cache.lookup(["a", "a", "a"], QUERIES, EncoderId.MAIN)
    assert sum(store.reads) == 2  # the query output, then the features


async def test_a_store_that_fails_is_a_miss() -> None:
    store = FakeStore()
    store.failing = True
    bench = Bench(store)
    assert (await bench.cache.lookup(["a"], QUERIES, EncoderId.MAIN))["a"] == {}
    assert ("redis", EmbeddingKind.QUERY_OUTPUT, "error") in bench.counts
