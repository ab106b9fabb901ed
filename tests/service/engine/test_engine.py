"""The engine over a fake model: what shares a batch, who is answered when, and what a failure does."""

import gc
import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from torch import Tensor

from model import GenerationParams
from service.engine.request import Answer, ImageInput, Kind, Mode, Ticket, Tower
from service.errors import DeadlineExceededError, InferenceFailedError, NotReadyError
from tests.service.fakes import DEADLY_WORD, NAN_WORD, POISON_RED, POISON_WORD, TIMEOUT_S, FakeBackend, pixels
from tests.service.running import text_of, until, workshop


def test_a_job_is_answered_with_the_text_of_its_image_and_prompt() -> None:
    with workshop() as shop:
        assert text_of(shop.caption(7, "hello there")) == "7 hello there #0"


def test_jobs_that_wait_together_share_one_vision_batch_and_one_decoder() -> None:
    with workshop(started=False) as shop:
        jobs = [shop.caption(red, "a b c") for red in range(5)]
        shop.engine.start()
        assert [text_of(job) for job in jobs] == [f"{red} a b c #0" for red in range(5)]
        assert shop.backend.vision_batches == [[0, 1, 2, 3, 4]]
        assert shop.backend.decode_batches == [5, 5, 5]


def test_equal_images_in_flight_share_one_encoding_without_any_cache() -> None:
    with workshop(started=False, cache_bytes=0) as shop:
        jobs = [shop.caption(9, f"prompt {index}") for index in range(4)]
        shop.engine.start()
        assert [text_of(job) for job in jobs] == [f"9 prompt {index} #0" for index in range(4)]
        assert shop.backend.vision_batches == [[9]]
        assert not any(job.ticket.future.result().image_cached for job in jobs)


def test_a_job_that_joins_while_its_image_is_decoded_needs_no_second_encoding() -> None:
    with workshop(cache_bytes=0) as shop:
        shop.backend.decode_gate.clear()
        first = shop.caption(9, "a b")
        until(lambda: shop.backend.vision_batches)
        second = shop.caption(9, "c d")
        shop.backend.decode_gate.set()
        assert text_of(first) == "9 a b #0"
        assert text_of(second) == "9 c d #0"
        assert shop.backend.vision_batches == [[9]]


def test_several_questions_on_one_image_use_one_encoding() -> None:
    with workshop(cache_bytes=0) as shop:
        job = shop.caption(3, "what", "who", "where")
        assert [text_of(job, prompt) for prompt in range(3)] == ["3 what #0", "3 who #0", "3 where #0"]
        assert shop.backend.vision_batches == [[3]]


def test_a_known_image_skips_the_vision_tower_and_says_so() -> None:
    with workshop() as shop:
        assert not shop.caption(5).ticket.future.result(TIMEOUT_S).image_cached
        again = shop.caption(5).ticket.future.result(TIMEOUT_S)
        assert again.image_cached
        assert again.times.vision_s == 0.0
        assert again.fresh == ()
        assert shop.backend.vision_batches == [[5]]


def test_cached_image_features_suffice_without_pixels() -> None:
    with workshop(cache_bytes=0) as shop:
        features = shop.backend.encode_images(pixels(8)[None], Tower.MAIN)[0]
        shop.backend.vision_batches.clear()
        image = ImageInput("other", None, {Kind.IMAGE_FEATURES: features})
        job = shop.caption(0, "hello", image=image)
        assert text_of(job) == "8 hello #0"
        assert job.ticket.future.result().image_cached
        assert [fresh.kind for fresh in job.ticket.future.result().fresh] == [Kind.QUERY_OUTPUT]
        assert shop.backend.vision_batches == []


def test_what_was_computed_is_handed_out_once_to_be_stored() -> None:
    with workshop(started=False) as shop:
        jobs = [shop.caption(9), shop.caption(9)]
        shop.engine.start()
        fresh = [fresh for job in jobs for fresh in job.ticket.future.result(TIMEOUT_S).fresh]
        assert [(item.digest, item.kind) for item in fresh] == [("digest-9", Kind.QUERY_OUTPUT)]


def test_the_image_of_a_caption_is_let_go_without_waiting_for_the_garbage_collector() -> None:
    gc.disable()
    try:
        with workshop() as shop:
            text_of(shop.caption(7))
            until(lambda: shop.engine.num_images == 0)
    finally:
        gc.enable()


def test_a_short_job_leaves_before_a_long_one_that_came_first() -> None:
    with workshop(started=False) as shop:
        long, short = shop.caption(1, " ".join("abcdefgh")), shop.caption(2, "a")
        order: list[str] = []
        long.ticket.future.add_done_callback(lambda _: order.append("long"))
        short.ticket.future.add_done_callback(lambda _: order.append("short"))
        shop.engine.start()
        text_of(long)
        assert order == ["short", "long"]


def test_a_job_joins_between_two_steps_of_another() -> None:
    with workshop() as shop:
        shop.backend.decode_gate.clear()
        first = shop.caption(1, "a b c d")
        until(lambda: shop.backend.vision_batches)
        second = shop.caption(2, "a")
        shop.backend.decode_gate.set()
        assert text_of(first) == "1 a b c d #0"
        assert text_of(second) == "2 a #0"
        assert 2 in shop.backend.decode_batches


def test_rows_on_the_device_stay_within_the_limit() -> None:
    with workshop(started=False, max_rows=16) as shop:
        params = GenerationParams(num_beams=5)
        jobs = [shop.caption(1, "a b", "c d", "e f", params=params) for _ in range(3)]
        shop.engine.start()
        assert [text_of(job, 2) for job in jobs] == ["1 e f #0"] * 3
        assert max(shop.backend.decode_batches) == 3  # of five rows each


def test_a_job_of_many_images_does_not_hold_up_the_one_behind_it() -> None:
    with workshop(started=False) as shop:
        many = shop.match("50", *(shop.image(red) for red in range(100, 160)))
        single = shop.caption(7)
        shop.engine.start()
        text_of(single)
        many.ticket.future.result(TIMEOUT_S)
        assert 7 in shop.backend.vision_batches[0]
        assert max(len(batch) for batch in shop.backend.vision_batches) == 8


def test_a_poisoned_image_fails_alone() -> None:
    with workshop(started=False) as shop:
        good = [shop.caption(red) for red in range(20, 27)]
        bad = shop.caption(POISON_RED)
        shop.engine.start()
        assert [text_of(job) for job in good] == [f"{red} a photo #0" for red in range(20, 27)]
        with pytest.raises(InferenceFailedError, match="log"):
            bad.ticket.future.result(TIMEOUT_S)
        assert text_of(shop.caption(40)) == "40 a photo #0"


def test_a_poisoned_prompt_fails_alone() -> None:
    with workshop(started=False) as shop:
        good = [shop.caption(red, "a b c") for red in range(20, 25)]
        bad = shop.caption(30, f"a {POISON_WORD} c")
        shop.engine.start()
        assert [text_of(job) for job in good] == [f"{red} a b c #0" for red in range(20, 25)]
        with pytest.raises(InferenceFailedError):
            bad.ticket.future.result(TIMEOUT_S)
        assert text_of(shop.caption(40)) == "40 a photo #0"


def test_a_poisoned_pair_fails_alone() -> None:
    with workshop(started=False) as shop:
        bad = shop.match("9", shop.image(POISON_RED + 1), mode=Mode.ITM)
        good = shop.match("9", shop.image(20), mode=Mode.ITM)
        shop.engine.start()
        assert good.ticket.future.result(TIMEOUT_S).value[0].index == 0
        with pytest.raises(InferenceFailedError):
            bad.ticket.future.result(TIMEOUT_S)


def test_an_image_that_failed_once_may_be_tried_again() -> None:
    with workshop() as shop:
        with pytest.raises(InferenceFailedError):
            text_of(shop.caption(POISON_RED))
        retried = ImageInput(f"digest-{POISON_RED}", pixels(50), {})
        assert text_of(shop.caption(0, image=retried)) == "50 a photo #0"


def test_of_two_who_settle_a_ticket_at_once_one_has_the_last_word_and_the_other_does_nothing() -> None:
    both_looked = threading.Barrier(2)

    class Slow(Future[Answer[int]]):
        """Lets both look before either acts, where both may look at once."""

        def done(self) -> bool:
            is_done = super().done()
            with suppress(threading.BrokenBarrierError):
                both_looked.wait(0.2)
            return is_done

    ticket: Ticket[int] = Ticket(future=Slow())
    with ThreadPoolExecutor(2) as threads:
        for ended in [threads.submit(ticket.fail, NotReadyError("gone")) for _ in range(2)]:
            ended.result(TIMEOUT_S)
    assert isinstance(ticket.future.exception(), NotReadyError)


def test_a_score_that_is_not_a_number_is_no_answer() -> None:
    with workshop() as shop, pytest.raises(InferenceFailedError, match="not a number"):
        text_of(shop.caption(1, NAN_WORD))


def test_an_expired_job_never_reaches_the_device() -> None:
    with workshop(started=False) as shop:
        expired = shop.caption(1, deadline=time.monotonic())
        other = shop.caption(2)
        shop.engine.start()
        text_of(other)
        with pytest.raises(DeadlineExceededError):
            expired.ticket.future.result(TIMEOUT_S)
        assert shop.backend.vision_batches == [[2]]


def test_an_abandoned_job_in_line_never_reaches_the_device() -> None:
    with workshop(started=False) as shop:
        abandoned, other = shop.caption(1), shop.caption(2)
        assert abandoned.ticket.future.cancel()
        shop.engine.start()
        text_of(other)
        assert shop.backend.vision_batches == [[2]]
        assert shop.line.num_items == 0


def test_a_job_abandoned_while_it_runs_leaves_the_decoder() -> None:
    with workshop() as shop:
        shop.backend.decode_gate.clear()
        job = shop.caption(1, "a b c d e f")
        until(lambda: shop.engine.num_running == 1)
        assert job.ticket.future.cancel()
        shop.backend.decode_gate.set()
        until(lambda: shop.engine.num_running == 0)
        with pytest.raises(CancelledError):
            job.ticket.future.result(TIMEOUT_S)
        assert text_of(shop.caption(2)) == "2 a photo #0"
        assert shop.backend.num_cancelled == 1


def test_the_heart_beats_while_idle_and_stops_while_the_device_hangs() -> None:
    with workshop() as shop:
        text_of(shop.caption(1))
        until(lambda: shop.engine.heartbeat_age_s() == 0)
        shop.backend.encode_gate.clear()
        hung = shop.caption(2)
        until(lambda: shop.engine.heartbeat_age_s() > 0.05)
        shop.backend.encode_gate.set()
        text_of(hung)
        until(lambda: shop.engine.heartbeat_age_s() == 0)


def test_a_job_that_nobody_takes_counts_as_no_progress() -> None:
    with workshop(started=False) as shop:
        shop.caption(1)
        until(lambda: shop.engine.heartbeat_age_s() > 0.01)
        shop.engine.start()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it is meant to die
def test_where_the_device_is_lost_all_jobs_are_told_and_no_more_are_taken() -> None:
    with workshop(started=False) as shop:
        jobs = [shop.caption(1, DEADLY_WORD), shop.caption(2, "a b c"), shop.caption(3, "a b c")]
        shop.engine.start()
        for job in jobs:
            with pytest.raises(NotReadyError):
                job.ticket.future.result(TIMEOUT_S)
        until(lambda: not shop.engine.alive)
        with pytest.raises(NotReadyError, match="restarted"):
            shop.line.reserve(1)


def test_stopping_tells_those_in_line_and_those_that_run() -> None:
    with workshop(max_rows=16) as shop:
        shop.backend.decode_gate.clear()
        running = shop.caption(1, "a b c", params=GenerationParams(num_beams=16))
        until(lambda: shop.engine.num_running == 1)
        waiting = shop.caption(2)
        shop.engine.stop(0)
        shop.backend.decode_gate.set()
        for job in (running, waiting):
            with pytest.raises(NotReadyError):
                job.ticket.future.result(TIMEOUT_S)


def test_an_engine_that_was_never_started_can_be_stopped() -> None:
    with workshop(started=False) as shop:
        waiting = shop.caption(1)
        shop.engine.stop(TIMEOUT_S)
        with pytest.raises(NotReadyError):
            waiting.ticket.future.result(TIMEOUT_S)


def test_an_answer_tells_where_its_time_went_and_with_how_many_rows() -> None:
    with workshop(started=False) as shop:
        jobs = [shop.caption(red, "a b", params=GenerationParams(num_beams=4)) for red in (1, 2, 3)]
        shop.engine.start()
        answers = [job.ticket.future.result(TIMEOUT_S) for job in jobs]
        assert {answer.max_rows for answer in answers} == {12}
        for answer in answers:
            assert answer.times.queue_s > 0
            assert answer.times.vision_s > 0
            assert answer.times.work_s > 0


@pytest.mark.parametrize("can_match", [True, False])
def test_a_checkpoint_without_a_head_still_serves_the_other(can_match: bool) -> None:
    backend = FakeBackend(can_generate=not can_match, can_match=can_match)
    with workshop(backend) as shop:
        if can_match:
            assert len(shop.match("1", "2", "3").ticket.future.result(TIMEOUT_S).value) == 2
        else:
            assert text_of(shop.caption(1)) == "1 a photo #0"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it is meant to die
def test_a_device_lost_while_a_job_is_taken_in_leaves_nobody_waiting() -> None:
    class Lost(FakeBackend):
        def to_device(self, tensor: Tensor) -> Tensor:
            raise torch.AcceleratorError("the device is lost")

    with workshop(Lost(), started=False) as shop:
        known = ImageInput("known", None, {Kind.QUERY_OUTPUT: torch.zeros(1, 2)})
        jobs = [shop.caption(0, image=known), shop.caption(1)]
        shop.engine.start()
        for job in jobs:
            with pytest.raises(NotReadyError):
                job.ticket.future.result(TIMEOUT_S)
