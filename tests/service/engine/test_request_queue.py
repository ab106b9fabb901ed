"""The bounded queue: exact in what it admits, first come first served, and closed once."""

import threading

import pytest
import torch

from model import GenerationParams
from service.engine.image_pool import ImageInput
from service.engine.request import AdmissionClass, AnyRequest, GenerateInput, Request
from service.engine.request_queue import RequestQueue, Throughput
from service.errors import NotReadyError, OverloadedError
from tests.service.fakes import TIMEOUT_S

ALL = frozenset(AdmissionClass)


def request(max_new_tokens: int = 10, *, caller: str = "", num_prompts: int = 1) -> AnyRequest:
    params = GenerationParams(max_new_tokens=max_new_tokens)
    inputs = GenerateInput(ImageInput("digest", None, {}), ((1,),) * num_prompts, params)
    return Request(inputs, caller=caller)


def queue(max_items: int = 4) -> RequestQueue:
    return RequestQueue(max_items, Throughput(jitter=lambda: 0.0))


def test_exactly_as_many_items_are_admitted_as_the_limit_says() -> None:
    waiting = queue(4)
    reservations = [waiting.make_reservations(1)[0] for _ in range(4)]
    for _ in range(3):
        with pytest.raises(OverloadedError, match=r"4 items wait.*brings 1 more.*limit is 4"):
            waiting.make_reservations(1)
    with reservations[0]:
        pass
    waiting.make_reservations(1)
    assert waiting.num_items == 4


def image_request(num_bytes: int) -> AnyRequest:
    pixels = torch.zeros(num_bytes, dtype=torch.uint8) if num_bytes else None
    return Request(GenerateInput(ImageInput("digest", pixels, {}), ((1,),), GenerationParams()))


def test_decoded_images_wait_up_to_the_limit_in_bytes_and_not_one_byte_more() -> None:
    waiting = RequestQueue(100, Throughput(jitter=lambda: 0.0), max_bytes=1000)
    waiting.make_reservations(1, num_bytes=400)
    waiting.make_reservations(1, 1, num_bytes=300)
    assert waiting.num_bytes == 1000
    with pytest.raises(OverloadedError, match=r"of 1000 bytes wait.*brings 1 more.*limit is 1000"):
        waiting.make_reservations(1, num_bytes=1)
    waiting.make_reservations(1)  # without images


def test_a_request_of_more_bytes_than_the_limit_waits_alone() -> None:
    waiting = RequestQueue(100, Throughput(jitter=lambda: 0.0), max_bytes=1000)
    (large,) = waiting.make_reservations(1, num_bytes=5000)
    with pytest.raises(OverloadedError):
        waiting.make_reservations(1, num_bytes=1)
    with large:
        large.submit(image_request(5000))
        assert waiting.take(ALL) is not None
    assert waiting.num_bytes == 0
    waiting.make_reservations(1, num_bytes=1)
    with pytest.raises(OverloadedError):
        waiting.make_reservations(1, num_bytes=5000)


def test_bulk_requests_hold_at_most_half_of_items_and_bytes_and_keep_no_other_out() -> None:
    waiting = RequestQueue(100, Throughput(jitter=lambda: 0.0), max_bytes=1000)
    waiting.make_reservations(30, num_bytes=300, is_bulk=True)
    waiting.make_reservations(10, num_bytes=200, is_bulk=True)
    with pytest.raises(
        OverloadedError, match=r"500 bytes wait in bulk requests.*brings 1 more.*limit is 500"
    ):
        waiting.make_reservations(1, num_bytes=1, is_bulk=True)
    waiting.make_reservations(10, is_bulk=True)
    with pytest.raises(OverloadedError, match=r"50 items of bulk requests wait.*brings 1 more.*limit is 50"):
        waiting.make_reservations(1, is_bulk=True)
    waiting.make_reservations(50, num_bytes=1000)
    with pytest.raises(OverloadedError, match="100 items wait"):
        waiting.make_reservations(1)


def test_a_bulk_request_of_more_than_half_waits_beside_others_but_not_beside_another_bulk_request() -> None:
    waiting = RequestQueue(100, Throughput(jitter=lambda: 0.0), max_bytes=1000)
    waiting.make_reservations(5, num_bytes=900)
    (bulk,) = waiting.make_reservations(80, num_bytes=5000, is_bulk=True)
    with pytest.raises(OverloadedError):
        waiting.make_reservations(1, num_bytes=1, is_bulk=True)
    waiting.make_reservations(15, num_bytes=100)
    with bulk:
        pass
    waiting.make_reservations(60, num_bytes=5000, is_bulk=True)


def test_bytes_of_images_that_need_no_decoding_are_given_back() -> None:
    waiting = RequestQueue(100, Throughput(jitter=lambda: 0.0), max_bytes=1000)
    (reservation,) = waiting.make_reservations(1, num_bytes=800)
    reservation.submit(image_request(0))
    assert waiting.num_bytes == 0
    with reservation:
        pass
    assert waiting.num_bytes == waiting.num_items == 0


def test_several_reservations_are_reserved_together_or_not_at_all() -> None:
    waiting = queue(4)
    waiting.make_reservations(1, 1)
    with pytest.raises(OverloadedError):
        waiting.make_reservations(1, 1, 1)
    assert waiting.num_items == 2
    assert len(waiting.make_reservations(1, 1)) == 2


def test_requests_are_admitted_the_order_in_which_they_came() -> None:
    waiting = queue()
    requests = [request(), request()]
    for one in requests:
        waiting.make_reservations(2)[0].submit(one)
    assert [waiting.take(ALL), waiting.take(ALL)] == requests
    assert [one.num_items for one in requests] == [2, 2]
    assert waiting.take(ALL) is None
    assert waiting.num_items == 0


def test_a_class_without_room_is_passed_and_keeps_its_order() -> None:
    waiting = queue()
    short, long, late = request(), request(max_new_tokens=100), request()
    for one in (long, short, late):
        waiting.make_reservations(1)[0].submit(one)
    assert waiting.take({AdmissionClass.SHORT, AdmissionClass.MATCH}) is short
    assert waiting.take(ALL) is long
    assert waiting.take({AdmissionClass.LONG}) is None
    assert waiting.take({AdmissionClass.SHORT}) is late


def test_callers_take_turns_by_the_cost_of_their_requests() -> None:
    waiting = queue(100)
    costly = [request(caller="a", num_prompts=10) for _ in range(3)]
    cheap = [request(caller="b") for _ in range(3)]
    for one in (*costly, *cheap):
        waiting.make_reservations(1)[0].submit(one)
    taken = [waiting.take(ALL) for _ in range(6)]
    assert taken == [costly[0], *cheap, *costly[1:]]


def test_a_request_of_many_row_tokens_is_long_although_its_answers_are_short() -> None:
    assert request(32, num_prompts=12).admission_class is AdmissionClass.SHORT  # 12 x 5 x 32 row-tokens
    assert request(32, num_prompts=13).admission_class is AdmissionClass.LONG
    assert request(33).admission_class is AdmissionClass.LONG


def test_a_reservation_that_is_left_withdraws_its_request() -> None:
    waiting = queue()
    (reservation,) = waiting.make_reservations(3)
    with reservation:
        reservation.submit(request())
    assert waiting.num_items == 0
    assert waiting.take(ALL) is None


def test_a_reservation_that_is_left_after_its_request_was_taken_changes_nothing() -> None:
    waiting = queue()
    (reservation,) = waiting.make_reservations(3)
    with reservation:
        reservation.submit(request())
        assert waiting.take(ALL) is not None
        waiting.make_reservations(2)
    assert waiting.num_items == 2


def test_waiting_ends_when_a_request_comes_and_when_the_queue_closes() -> None:
    waiting = queue()
    seen: list[bool] = []
    watcher = threading.Thread(target=lambda: seen.extend([waiting.wait(), waiting.wait()]))
    waiting.make_reservations(1)[0].submit(request())
    assert waiting.wait()
    waiting.take(ALL)
    watcher.start()
    waiting.make_reservations(1)[0].submit(request())
    waiting.close("closed for the test")
    watcher.join(TIMEOUT_S)
    assert seen[-1] is False


def test_a_closed_queue_gives_back_who_waited_and_takes_nobody() -> None:
    waiting = queue()
    (reservation,) = waiting.make_reservations(1)
    (late,) = waiting.make_reservations(1)
    one = request()
    reservation.submit(one)
    assert waiting.close("the engine is gone") == [one]
    assert waiting.num_items == 0
    with pytest.raises(NotReadyError, match="the engine is gone"):
        waiting.make_reservations(1)
    with late, pytest.raises(NotReadyError, match="the engine is gone"):
        late.submit(request())
    assert waiting.close("again") == []


def test_retry_after_follows_the_measured_rate_within_its_bounds() -> None:
    throughput = Throughput(jitter=lambda: 0.0)
    assert throughput.seconds_for(100) == 1  # nothing is known yet
    throughput.record(num_items=10, busy_s=5.0)  # two a second
    assert throughput.seconds_for(8) == 4
    assert throughput.seconds_for(0) == 1
    assert throughput.seconds_for(10_000) == 60


def test_retry_after_forgets_how_slow_it_once_was() -> None:
    throughput = Throughput(jitter=lambda: 0.0)
    throughput.record(num_items=1, busy_s=10.0)
    for _ in range(200):
        throughput.record(num_items=10, busy_s=1.0)
    assert throughput.seconds_for(100) == pytest.approx(10, abs=1)


def test_retry_after_is_spread_by_at_most_a_quarter() -> None:
    throughput = Throughput(jitter=lambda: 0.999)
    throughput.record(num_items=10, busy_s=10.0)
    assert throughput.seconds_for(20) == 25


def test_a_full_queue_says_when_to_come_back() -> None:
    throughput = Throughput(jitter=lambda: 0.0)
    throughput.record(num_items=1, busy_s=2.0)
    waiting = RequestQueue(3, throughput)
    waiting.make_reservations(3)
    with pytest.raises(OverloadedError) as refused:
        waiting.make_reservations(1)
    assert refused.value.retry_after_s == 6
