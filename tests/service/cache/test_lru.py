"""The in-process cache: bounded in bytes, least recently used out first."""

import torch

from model import EmbeddingKind
from service.cache.lru import LruTier

KB = 1024


def tensor(num_bytes: int, value: float = 0.0) -> torch.Tensor:
    return torch.full((num_bytes // 4,), value)


def test_what_was_put_is_found_by_digest_and_kind() -> None:
    cache = LruTier(64 * KB)
    cache.put("a", EmbeddingKind.QUERY_OUTPUT, tensor(KB, 1.0))
    cache.put("a", EmbeddingKind.IMAGE_EMBEDS, tensor(KB, 2.0))
    found = cache.get("a", EmbeddingKind.IMAGE_EMBEDS)
    assert found is not None
    assert found[0] == 2.0
    assert cache.get("b", EmbeddingKind.QUERY_OUTPUT) is None
    assert cache.get("a", EmbeddingKind.IMAGE_FEATURES) is None


def test_the_bytes_never_exceed_the_limit() -> None:
    cache = LruTier(10 * KB)
    for index in range(100):
        cache.put(str(index), EmbeddingKind.QUERY_OUTPUT, tensor(3 * KB))
        assert cache.num_bytes <= 10 * KB
    assert cache.num_bytes > 5 * KB


def test_the_least_recently_used_goes_first() -> None:
    cache = LruTier(8 * KB)
    for name in ("a", "b"):
        cache.put(name, EmbeddingKind.QUERY_OUTPUT, tensor(3 * KB))
    cache.get("a", EmbeddingKind.QUERY_OUTPUT)
    cache.put("c", EmbeddingKind.QUERY_OUTPUT, tensor(3 * KB))
    assert cache.get("b", EmbeddingKind.QUERY_OUTPUT) is None
    assert cache.get("a", EmbeddingKind.QUERY_OUTPUT) is not None


def test_replacing_an_entry_counts_it_once() -> None:
    cache = LruTier(64 * KB)
    for _ in range(3):
        cache.put("a", EmbeddingKind.QUERY_OUTPUT, tensor(4 * KB))
    assert cache.num_bytes < 5 * KB


def test_an_entry_larger_than_the_cache_is_not_kept_and_drives_nothing_out() -> None:
    cache = LruTier(4 * KB)
    cache.put("small", EmbeddingKind.QUERY_OUTPUT, tensor(KB))
    cache.put("large", EmbeddingKind.QUERY_OUTPUT, tensor(8 * KB))
    assert cache.get("large", EmbeddingKind.QUERY_OUTPUT) is None
    assert cache.get("small", EmbeddingKind.QUERY_OUTPUT) is not None


def test_a_cache_of_no_bytes_keeps_nothing() -> None:
    cache = LruTier(0)
    cache.put("a", EmbeddingKind.QUERY_OUTPUT, tensor(4))
    assert cache.get("a", EmbeddingKind.QUERY_OUTPUT) is None


def test_a_view_is_counted_with_all_that_it_keeps_alive() -> None:
    cache = LruTier(8 * KB)
    cache.put("view", EmbeddingKind.QUERY_OUTPUT, tensor(64 * KB)[:1])
    assert cache.get("view", EmbeddingKind.QUERY_OUTPUT) is None


def test_a_hot_embedding_survives_four_requests_of_a_thousand_images() -> None:
    cache = LruTier(100 * KB)
    for index in range(70):
        cache.put(f"hot{index}", EmbeddingKind.QUERY_OUTPUT, tensor(512))  # a kilobyte with its overhead
    for index in range(4000):
        cache.put(f"bulk{index}", EmbeddingKind.IMAGE_EMBEDS, tensor(512), is_bulk=True)
        assert cache.num_bytes <= 100 * KB
    assert all(cache.get(f"hot{index}", EmbeddingKind.QUERY_OUTPUT) is not None for index in range(70))
    kept = [cache.get(f"bulk{index}", EmbeddingKind.IMAGE_EMBEDS, is_bulk=True) for index in range(4000)]
    assert sum(each is not None for each in kept) == 25  # the quarter, and the latest of them
    assert all(each is not None for each in kept[-25:])


def test_what_a_large_request_brought_is_kept_as_any_other_once_another_request_uses_it() -> None:
    cache = LruTier(40 * KB)
    cache.put("used", EmbeddingKind.IMAGE_EMBEDS, tensor(512), is_bulk=True)
    assert cache.get("used", EmbeddingKind.IMAGE_EMBEDS) is not None
    for index in range(100):
        cache.put(f"bulk{index}", EmbeddingKind.IMAGE_EMBEDS, tensor(512), is_bulk=True)
    assert cache.get("used", EmbeddingKind.IMAGE_EMBEDS, is_bulk=True) is not None


def test_the_share_of_large_requests_is_free_for_others_while_it_is_not_used() -> None:
    cache = LruTier(40 * KB)
    for index in range(40):
        cache.put(str(index), EmbeddingKind.QUERY_OUTPUT, tensor(512))
    assert all(cache.get(str(index), EmbeddingKind.QUERY_OUTPUT) is not None for index in range(40))
    cache.put("bulk", EmbeddingKind.QUERY_OUTPUT, tensor(512), is_bulk=True)
    assert cache.get("bulk", EmbeddingKind.QUERY_OUTPUT, is_bulk=True) is not None
    assert cache.num_bytes <= 40 * KB
