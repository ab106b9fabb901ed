"""The bounded line: exact in what it lets in, first come first served, and closed once."""

import threading

import pytest

from model import GenerationParams
from service.engine.request import GenerateJob, ImageInput, Lane, Ticket
from service.engine.request_queue import Line, ServiceRate
from service.errors import NotReadyError, OverloadedError
from tests.service.fakes import TIMEOUT_S


def job(max_new_tokens: int = 10) -> GenerateJob:
    params = GenerationParams(max_new_tokens=max_new_tokens)
    return GenerateJob(ImageInput("digest", None, {}), ((1,),), params, Ticket())


def line(max_items: int = 4) -> Line:
    return Line(max_items, ServiceRate(jitter=lambda: 0.0))


def test_exactly_as_many_items_are_let_in_as_the_limit_says() -> None:
    waiting = line(4)
    places = [waiting.reserve(1)[0] for _ in range(4)]
    for _ in range(3):
        with pytest.raises(OverloadedError, match=r"4 items wait.*brings 1 more.*limit is 4"):
            waiting.reserve(1)
    with places[0]:
        pass
    waiting.reserve(1)
    assert waiting.num_items == 4


def test_several_places_are_reserved_together_or_not_at_all() -> None:
    waiting = line(4)
    waiting.reserve(1, 1)
    with pytest.raises(OverloadedError):
        waiting.reserve(1, 1, 1)
    assert waiting.num_items == 2
    assert len(waiting.reserve(1, 1)) == 2


def test_jobs_are_taken_in_the_order_in_which_they_came() -> None:
    waiting = line()
    jobs = [job(), job()]
    for one in jobs:
        waiting.reserve(2)[0].put(one)
    assert [waiting.take(Lane), waiting.take(Lane)] == [(jobs[0], 2), (jobs[1], 2)]
    assert waiting.take(Lane) is None
    assert waiting.num_items == 0


def test_a_lane_without_room_is_passed_and_keeps_its_order() -> None:
    waiting = line()
    short, long, late = job(), job(max_new_tokens=100), job()
    for one in (long, short, late):
        waiting.reserve(1)[0].put(one)
    assert waiting.take({Lane.SHORT, Lane.MATCH}) == (short, 1)
    assert waiting.take(Lane) == (long, 1)
    assert waiting.take({Lane.LONG}) is None
    assert waiting.take({Lane.SHORT}) == (late, 1)


def test_a_place_that_is_left_withdraws_its_job() -> None:
    waiting = line()
    (place,) = waiting.reserve(3)
    with place:
        place.put(job())
    assert waiting.num_items == 0
    assert waiting.take(Lane) is None


def test_a_place_that_is_left_after_its_job_was_taken_changes_nothing() -> None:
    waiting = line()
    (place,) = waiting.reserve(3)
    with place:
        place.put(job())
        assert waiting.take(Lane) is not None
        waiting.reserve(2)
    assert waiting.num_items == 2


def test_waiting_ends_when_a_job_comes_and_when_the_line_closes() -> None:
    waiting = line()
    seen: list[bool] = []
    watcher = threading.Thread(target=lambda: seen.extend([waiting.wait(), waiting.wait()]))
    waiting.reserve(1)[0].put(job())
    assert waiting.wait()
    waiting.take(Lane)
    watcher.start()
    waiting.reserve(1)[0].put(job())
    waiting.close("closed for the test")
    watcher.join(TIMEOUT_S)
    assert seen[-1] is False


def test_a_closed_line_gives_back_who_waited_and_takes_nobody() -> None:
    waiting = line()
    (place,) = waiting.reserve(1)
    (late,) = waiting.reserve(1)
    one = job()
    place.put(one)
    assert waiting.close("the engine is gone") == [one]
    assert waiting.num_items == 0
    with pytest.raises(NotReadyError, match="the engine is gone"):
        waiting.reserve(1)
    with late, pytest.raises(NotReadyError, match="the engine is gone"):
        late.put(job())
    assert waiting.close("again") == []


def test_retry_after_follows_the_measured_rate_within_its_bounds() -> None:
    rate = ServiceRate(jitter=lambda: 0.0)
    assert rate.seconds_for(100) == 1  # nothing is known yet
    rate.note(num_items=10, busy_s=5.0)  # two a second
    assert rate.seconds_for(8) == 4
    assert rate.seconds_for(0) == 1
    assert rate.seconds_for(10_000) == 60


def test_retry_after_forgets_how_slow_it_once_was() -> None:
    rate = ServiceRate(jitter=lambda: 0.0)
    rate.note(num_items=1, busy_s=10.0)
    for _ in range(200):
        rate.note(num_items=10, busy_s=1.0)
    assert rate.seconds_for(100) == pytest.approx(10, abs=1)


def test_retry_after_is_spread_by_at_most_a_quarter() -> None:
    rate = ServiceRate(jitter=lambda: 0.999)
    rate.note(num_items=10, busy_s=10.0)
    assert rate.seconds_for(20) == 25


def test_a_full_line_says_when_to_come_back() -> None:
    rate = ServiceRate(jitter=lambda: 0.0)
    rate.note(num_items=1, busy_s=2.0)
    waiting = Line(3, rate)
    waiting.reserve(3)
    with pytest.raises(OverloadedError) as refused:
        waiting.reserve(1)
    assert refused.value.retry_after_s == 6
