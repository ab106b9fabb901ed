"""The Redis level over a store that fails as the test wants; the real one is met in tests/integration."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch

from model import EmbeddingKind
from service.cache.breaker import CircuitBreaker
from service.cache.read_batcher import CacheRead, ReadBatcher
from service.cache.redis_store import RefusedError, StoreError
from service.cache.redis_tier import RedisTier
from service.cache.wire import pack
from tests.service.running import until_async

KIND = EmbeddingKind.QUERY_OUTPUT
EXPECTED = torch.empty(2, device="meta")


class FakeStore:
    """Keeps bytes in a dictionary; failing, it raises; hanging, it never answers."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.failing = False
        self.refusing = False
        self.hanging = False
        self.reads: list[int] = []
        self.num_writes = 0
        self.concurrent = self.most_concurrent = 0
        self.closed = False

    async def get_many(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        self.reads.append(len(keys))
        self.concurrent += 1
        self.most_concurrent = max(self.concurrent, self.most_concurrent)
        try:
            await self._misbehave()
        finally:
            self.concurrent -= 1
        return [self.values.get(key) for key in keys]

    async def set_many(self, items: Mapping[str, bytes], ttl_s: int) -> None:
        self.num_writes += 1
        await self._misbehave()
        if self.refusing:
            raise RefusedError("OOM command not allowed when used memory > 'maxmemory'.")
        self.values.update(items)

    async def delete_many(self, keys: Sequence[str]) -> None:
        await self._misbehave()
        if self.refusing:
            raise RefusedError("READONLY You can't write against a read only replica.")
        for key in keys:
            self.values.pop(key, None)

    async def aclose(self) -> None:
        self.closed = True

    async def _misbehave(self) -> None:
        if self.hanging:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        if self.failing:
            raise StoreError("is down")


def tier(store: FakeStore, clock: Callable[[], float] = lambda: 0.0) -> RedisTier:
    return RedisTier(store, CircuitBreaker(clock=clock, jitter=lambda: 0.0), ttl_s=60)


async def test_hits_and_misses_come_back_in_the_order_of_the_keys() -> None:
    store = FakeStore()
    store.values = {"b": pack("b", torch.ones(2))}
    reads = await tier(store).get(EmbeddingKind.QUERY_OUTPUT, ["a", "b", "c"], EXPECTED)
    assert [read.result for read in reads] == ["miss", "hit", "miss"]
    assert reads[1].tensor is not None
    assert reads[1].tensor.tolist() == [1, 1]


async def test_small_values_are_read_many_at_once_and_large_ones_one_by_one() -> None:
    store = FakeStore()
    under_test = tier(store)
    await under_test.get(EmbeddingKind.QUERY_OUTPUT, [str(index) for index in range(70)], EXPECTED)
    assert store.reads == [32, 32, 6]
    store.reads.clear()
    await under_test.get(EmbeddingKind.IMAGE_FEATURES, [str(index) for index in range(20)], EXPECTED)
    assert store.reads == [1] * 20
    assert store.most_concurrent <= 8


async def test_requests_that_come_while_one_is_read_share_the_next_round_trip() -> None:
    store = FakeStore()
    store.values = {str(index): pack(str(index), torch.full((2,), float(index))) for index in range(10)}
    under_test = tier(store)
    reads = await asyncio.gather(
        *(under_test.get(EmbeddingKind.QUERY_OUTPUT, [str(index)], EXPECTED) for index in range(10))
    )
    assert [read.tensor[0].item() for (read,) in reads if read.tensor is not None] == list(range(10))
    assert sum(store.reads) == 10
    assert len(store.reads) <= 3


async def test_a_burst_of_requests_is_read_to_the_last_however_fast_each_round_trip_is() -> None:
    async def at_once(keys: Sequence[str]) -> list[CacheRead]:
        return [CacheRead(None, "skipped")] * len(keys)

    line = ReadBatcher(at_once, per_read=32, max_reads=2, budget_s=5.0)
    burst = []
    for number in range(16):
        burst.append(asyncio.create_task(line.get([str(number)])))
        if number % 2:
            await asyncio.sleep(0)
    assert [read.result for (read,) in await asyncio.gather(*burst)] == ["skipped"] * 16


async def test_a_request_that_is_given_up_costs_the_others_nothing() -> None:
    store = FakeStore()
    store.values = {"b": pack("b", torch.ones(2))}
    under_test = tier(store)
    given_up = asyncio.create_task(under_test.get(EmbeddingKind.QUERY_OUTPUT, ["a"], EXPECTED))
    kept = asyncio.create_task(under_test.get(EmbeddingKind.QUERY_OUTPUT, ["b"], EXPECTED))
    await asyncio.sleep(0)
    given_up.cancel()
    assert [read.result for read in await kept] == ["hit"]
    assert not under_test.breaker_open


async def test_a_store_that_refuses_writes_is_read_all_the_same() -> None:
    store, counts = FakeStore(), Counter[str]()
    store.refusing = True
    store.values = {"a": pack("a", torch.ones(2))}
    under_test = RedisTier(
        store, CircuitBreaker(), ttl_s=60, count_writes=lambda result, count: counts.update({result: count})
    )
    for index in range(100):
        under_test.put(str(index), torch.ones(2))
    await until_async(lambda: counts["refused"] == 100)
    assert [read.result for read in await under_test.get(EmbeddingKind.QUERY_OUTPUT, ["a"], EXPECTED)] == [
        "hit"
    ]
    store.refusing = False
    under_test.put("b", torch.ones(2))
    await under_test.aclose(5)
    assert counts == {"refused": 100, "written": 1}


@pytest.mark.parametrize("failing", [True, False])
async def test_a_store_that_does_not_answer_at_the_start_is_told_of_in_the_log(
    failing: bool, caplog: pytest.LogCaptureFixture
) -> None:
    store = FakeStore()
    store.failing = failing
    await tier(store).ping()
    assert ("Redis is down" in caplog.text) is failing


async def test_a_corrupt_entry_is_an_error_and_gives_no_tensor() -> None:
    store = FakeStore()
    store.values = {"a": b"garbage", "b": pack("b", torch.ones(2))[:-1] + b"\xff"}
    reads = await tier(store).get(EmbeddingKind.QUERY_OUTPUT, ["a", "b"], EXPECTED)
    assert [(read.result, read.tensor) for read in reads] == [("error", None)] * 2


async def test_a_store_that_fails_gives_errors_then_is_left_alone() -> None:
    store = FakeStore()
    store.failing = True
    under_test = tier(store)
    for _ in range(5):
        assert [
            read.result for read in await under_test.get(EmbeddingKind.QUERY_OUTPUT, ["a"], EXPECTED)
        ] == ["error"]
    assert under_test.breaker_open
    assert [read.result for read in await under_test.get(EmbeddingKind.QUERY_OUTPUT, ["a"], EXPECTED)] == [
        "skipped"
    ]
    assert len(store.reads) == 5


async def test_a_store_that_comes_back_is_used_again() -> None:
    store = FakeStore()
    now = 0.0
    under_test = tier(store, lambda: now)
    store.failing = True
    for _ in range(5):
        await under_test.get(EmbeddingKind.QUERY_OUTPUT, ["a"], EXPECTED)
    store.failing = False
    now = 2.0
    assert [read.result for read in await under_test.get(EmbeddingKind.QUERY_OUTPUT, ["a"], EXPECTED)] == [
        "miss"
    ]
    assert not under_test.breaker_open


async def test_a_store_that_hangs_costs_a_second_at_most() -> None:
    store = FakeStore()
    store.hanging = True
    async with asyncio.timeout(10):
        reads = await tier(store).get(
            EmbeddingKind.IMAGE_FEATURES, [str(index) for index in range(30)], EXPECTED
        )
    assert [read.result for read in reads] == ["error"] * 30
    await until_async(lambda: store.concurrent == 0)


async def test_writes_follow_in_the_background_and_closing_waits_for_them() -> None:
    store = FakeStore()
    under_test = tier(store)
    for index in range(20):
        under_test.put(str(index), torch.full((2,), float(index)))
    assert store.values == {}
    await under_test.aclose(5)
    assert len(store.values) == 20
    assert store.values["7"] == pack("7", torch.tensor([7.0, 7.0]))
    assert store.closed


async def test_a_store_that_hangs_does_not_hold_up_closing() -> None:
    store = FakeStore()
    store.hanging = True
    under_test = tier(store)
    under_test.put("a", torch.ones(2))
    async with asyncio.timeout(10):
        await under_test.aclose(0.05)
    assert store.closed


async def test_writes_that_pile_up_are_dropped_not_kept() -> None:
    store = FakeStore()
    store.hanging = True
    under_test = tier(store)
    large = torch.empty(5 * 2**20, dtype=torch.float32)  # 20 MB
    for index in range(10):
        under_test.put(str(index), large)
    store.hanging = False
    await until_async(lambda: store.num_writes)
    assert store.values.keys() <= {"0", "1", "2"}
    await under_test.aclose(0.05)


async def test_writes_to_a_store_that_fails_are_dropped() -> None:
    store = FakeStore()
    store.failing = True
    under_test = tier(store)
    for index in range(100):
        under_test.put(str(index), torch.ones(2))
    await under_test.aclose(5)
    assert under_test.breaker_open
    assert store.num_writes == 5


BAD_TENSORS = {
    "another shape": torch.ones(3),
    "more dimensions": torch.ones(2, 1),
    "another dtype": torch.ones(2, dtype=torch.float16),
    "not a number": torch.tensor([1.0, float("nan")]),
    "infinite": torch.tensor([float("-inf"), 1.0]),
    "no dimensions": torch.tensor(1.0),
}


@pytest.mark.parametrize("kind", [EmbeddingKind.QUERY_OUTPUT, EmbeddingKind.IMAGE_FEATURES])
@pytest.mark.parametrize("bad", BAD_TENSORS)
async def test_an_entry_unlike_the_models_embeddings_is_not_used_and_is_deleted(
    bad: str, kind: EmbeddingKind, caplog: pytest.LogCaptureFixture
) -> None:
    store = FakeStore()
    store.values = {"a": pack("a", BAD_TENSORS[bad]), "b": pack("b", torch.ones(2))}
    under_test = tier(store)
    assert [read.result for read in await under_test.get(kind, ["a", "b"], EXPECTED)] == ["error", "hit"]
    assert "is not used and is deleted" in caplog.text
    await until_async(lambda: "a" not in store.values)
    assert "b" in store.values
    assert not under_test.breaker_open


@pytest.mark.parametrize("value", [b"", b"garbage", pack("other", torch.ones(2))])
async def test_a_corrupt_entry_is_deleted_and_what_replaces_it_stays(value: bytes) -> None:
    store = FakeStore()
    store.values = {"a": value}
    under_test = tier(store)
    assert [read.result for read in await under_test.get(KIND, ["a"], EXPECTED)] == ["error"]
    under_test.put("a", torch.ones(2))
    await under_test.aclose(5)
    assert store.values == {"a": pack("a", torch.ones(2))}


async def test_while_nothing_can_be_deleted_bad_entries_are_still_not_used() -> None:
    store = FakeStore()
    store.values = {"a": pack("a", torch.ones(3))}
    store.refusing = True
    under_test = tier(store)
    for _ in range(3):
        assert [read.result for read in await under_test.get(KIND, ["a"], EXPECTED)] == ["error"]
    await under_test.aclose(5)
    assert not under_test.breaker_open
