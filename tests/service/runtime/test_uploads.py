"""The budget of bytes over all request bodies."""

import asyncio

import pytest

from service.errors import OverloadedError
from service.runtime.readiness import UploadLease, Uploads

LIMIT = 100
LONG_S = 60.0
MEGABYTE = 2**20


async def test_exactly_the_budget_is_let_out_and_what_is_returned_can_be_had_again() -> None:
    uploads = Uploads(LIMIT)
    first, second = uploads.open("a"), uploads.open("b")
    first.declare(60)
    second.declare(40)
    with pytest.raises(OverloadedError, match=f"the limit is {LIMIT}") as refused:
        uploads.open("a").declare(1)
    assert 2 <= (refused.value.retry_after_s or 0) <= 8
    first.release(1)
    uploads.open("a").declare(1)
    second.close()
    second.close()
    assert uploads.num_bytes == 60


async def test_a_body_without_a_declared_size_counts_as_it_arrives() -> None:
    uploads = Uploads(LIMIT)
    lease = uploads.open("a")
    for num_arrived in (10, 30, LIMIT):
        lease.grow_to(num_arrived)
        assert uploads.num_bytes == num_arrived
    with pytest.raises(OverloadedError):
        lease.grow_to(LIMIT + 1)
    lease.keep(20)
    assert uploads.num_bytes == 20
    lease.release(1000)  # never more than it has
    assert uploads.num_bytes == 0


async def arriving(lease: UploadLease, num_declared: int, num_arrived: int) -> None:
    async with lease.arrive(LONG_S):
        lease.declare(num_declared)
        lease.grow_to(num_arrived)
        await asyncio.Event().wait()


async def test_the_slowest_of_those_that_arrive_is_displaced_but_not_at_once() -> None:
    uploads = Uploads(LIMIT)
    slow, slower = uploads.open("a"), uploads.open("a")
    tasks = [asyncio.create_task(arriving(slow, 50, 10)), asyncio.create_task(arriving(slower, 50, 1))]
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError):
        uploads.open("a").declare(30)
    for lease in (slow, slower):
        lease.started -= 2  # seconds ago
    with pytest.raises(OverloadedError):
        uploads.open("a").declare(LIMIT + 1)
    assert not slower.is_displaced  # in vain
    uploads.open("a").declare(30)
    assert (slow.is_displaced, slower.is_displaced) == (False, True)
    with pytest.raises(TimeoutError):
        await tasks[1]
    assert uploads.num_bytes == 80
    tasks[0].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not uploads.arriving


async def test_the_last_quarter_is_left_to_callers_that_hold_nothing() -> None:
    uploads = Uploads(LIMIT * MEGABYTE)
    uploads.open("a").declare(70 * MEGABYTE)
    uploads.open("a").declare(5 * MEGABYTE)
    with pytest.raises(OverloadedError, match=f"the limit is {75 * MEGABYTE}"):
        uploads.open("a").declare(MEGABYTE + 1)
    uploads.open("b").declare(20 * MEGABYTE)
    with pytest.raises(OverloadedError):
        uploads.open("b").declare(MEGABYTE + 1)


async def test_a_single_body_may_take_the_whole_budget_and_small_ones_its_last_quarter() -> None:
    uploads = Uploads(LIMIT * MEGABYTE)
    whole = uploads.open("a")
    whole.grow_to(80 * MEGABYTE)
    whole.grow_to(LIMIT * MEGABYTE)
    whole.close()
    uploads.open("a").declare(75 * MEGABYTE)
    small = uploads.open("a")
    small.grow_to(MEGABYTE)
    with pytest.raises(OverloadedError):
        small.grow_to(MEGABYTE + 1)
