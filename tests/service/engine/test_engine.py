"""The engine over a fake model: what shares a batch, who is answered when, and what a failure does."""

import gc
import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from torch import Tensor

from model import EmbeddingKind, GenerationParams
from service.engine.image_pool import ImageInput
from service.engine.request import Answer, MatchInput, Mode, Request
from service.errors import DeadlineExceededError, InferenceFailedError, LostRequestError, NotReadyError
from service.model_backend import EncoderId
from tests.service.fakes import DEADLY_WORD, NAN_WORD, POISON_RED, POISON_WORD, TIMEOUT_S, FakeBackend, pixels
from tests.service.running import running_engine, text_of, until


def test_a_request_is_answered_with_the_text_of_its_image_and_prompt() -> None:
    with running_engine() as harness:
        assert text_of(harness.caption(7, "hello there")) == "7 hello there #0"


def test_requests_that_wait_together_share_one_vision_batch_and_one_decoder() -> None:
    with running_engine(started=False) as harness:
        requests = [harness.caption(red, "a b c") for red in range(5)]
        harness.engine.start()
        assert [text_of(request) for request in requests] == [f"{red} a b c #0" for red in range(5)]
        assert harness.backend.vision_batches == [[0, 1, 2, 3, 4]]
        assert harness.backend.decode_batches == [5, 5, 5]


def test_equal_images_in_flight_share_one_encoding_without_any_cache() -> None:
    with running_engine(started=False, cache_bytes=0) as harness:
        requests = [harness.caption(9, f"prompt {index}") for index in range(4)]
        harness.engine.start()
        assert [text_of(request) for request in requests] == [f"9 prompt {index} #0" for index in range(4)]
        assert harness.backend.vision_batches == [[9]]
        assert not any(request.future.result().image_cached for request in requests)


def test_a_request_that_joins_while_its_image_is_decoded_needs_no_second_encoding() -> None:
    with running_engine(cache_bytes=0) as harness:
        harness.backend.decode_gate.clear()
        first = harness.caption(9, "a b")
        until(lambda: harness.backend.vision_batches)
        second = harness.caption(9, "c d")
        harness.backend.decode_gate.set()
        assert text_of(first) == "9 a b #0"
        assert text_of(second) == "9 c d #0"
        assert harness.backend.vision_batches == [[9]]


def test_several_questions_on_one_image_use_one_encoding() -> None:
    with running_engine(cache_bytes=0) as harness:
        request = harness.caption(3, "what", "who", "where")
        assert [text_of(request, prompt) for prompt in range(3)] == ["3 what #0", "3 who #0", "3 where #0"]
        assert harness.backend.vision_batches == [[3]]


def test_a_known_image_skips_the_image_encoder_and_says_so() -> None:
    with running_engine() as harness:
        assert not harness.caption(5).future.result(TIMEOUT_S).image_cached
        again = harness.caption(5).future.result(TIMEOUT_S)
        assert again.image_cached
        assert again.times.vision_s == 0.0
        assert again.computed == ()
        assert harness.backend.vision_batches == [[5]]


def test_cached_image_features_suffice_without_pixels() -> None:
    with running_engine(cache_bytes=0) as harness:
        features = harness.backend.encode_images(pixels(8)[None], EncoderId.MAIN)[0]
        harness.backend.vision_batches.clear()
        image = ImageInput("other", None, {EmbeddingKind.IMAGE_FEATURES: features})
        request = harness.caption(0, "hello", image=image)
        assert text_of(request) == "8 hello #0"
        assert request.future.result().image_cached
        assert [each.kind for each in request.future.result().computed] == [EmbeddingKind.QUERY_OUTPUT]
        assert harness.backend.vision_batches == []


def test_what_was_computed_is_handed_out_once_to_be_stored() -> None:
    with running_engine(started=False) as harness:
        requests = [harness.caption(9), harness.caption(9)]
        harness.engine.start()
        computed = [
            computed for request in requests for computed in request.future.result(TIMEOUT_S).computed
        ]
        assert [(item.digest, item.kind) for item in computed] == [("digest-9", EmbeddingKind.QUERY_OUTPUT)]


def test_the_image_of_a_caption_is_let_go_without_waiting_for_the_garbage_collector() -> None:
    gc.disable()
    try:
        with running_engine() as harness:
            text_of(harness.caption(7))
            until(lambda: harness.engine.num_images == 0)
    finally:
        gc.enable()


def test_a_short_request_leaves_before_a_long_one_that_came_first() -> None:
    with running_engine(started=False) as harness:
        long, short = harness.caption(1, " ".join("abcdefgh")), harness.caption(2, "a")
        order: list[str] = []
        long.future.add_done_callback(lambda _: order.append("long"))
        short.future.add_done_callback(lambda _: order.append("short"))
        harness.engine.start()
        text_of(long)
        assert order == ["short", "long"]


def test_a_request_joins_between_two_steps_of_another() -> None:
    with running_engine() as harness:
        harness.backend.decode_gate.clear()
        first = harness.caption(1, "a b c d")
        until(lambda: harness.backend.vision_batches)
        second = harness.caption(2, "a")
        harness.backend.decode_gate.set()
        assert text_of(first) == "1 a b c d #0"
        assert text_of(second) == "2 a #0"
        assert 2 in harness.backend.decode_batches


def test_rows_on_the_device_stay_within_the_limit() -> None:
    with running_engine(started=False, max_rows=16) as harness:
        params = GenerationParams(num_beams=5)
        requests = [harness.caption(1, "a b", "c d", "e f", params=params) for _ in range(3)]
        harness.engine.start()
        assert [text_of(request, 2) for request in requests] == ["1 e f #0"] * 3
        assert max(harness.backend.decode_batches) == 3  # of five rows each


def test_a_request_of_many_images_does_not_hold_up_the_one_behind_it() -> None:
    with running_engine(started=False) as harness:
        many = harness.match("50", *(harness.image(red) for red in range(100, 160)))
        single = harness.caption(7)
        harness.engine.start()
        text_of(single)
        many.future.result(TIMEOUT_S)
        assert 7 in harness.backend.vision_batches[0]
        assert max(len(batch) for batch in harness.backend.vision_batches) == 8


def test_a_poisoned_image_fails_alone() -> None:
    with running_engine(started=False) as harness:
        good = [harness.caption(red) for red in range(20, 27)]
        bad = harness.caption(POISON_RED)
        harness.engine.start()
        assert [text_of(request) for request in good] == [f"{red} a photo #0" for red in range(20, 27)]
        with pytest.raises(InferenceFailedError, match="log"):
            bad.future.result(TIMEOUT_S)
        assert text_of(harness.caption(40)) == "40 a photo #0"


def test_a_poisoned_prompt_fails_alone() -> None:
    with running_engine(started=False) as harness:
        good = [harness.caption(red, "a b c") for red in range(20, 25)]
        bad = harness.caption(30, f"a {POISON_WORD} c")
        harness.engine.start()
        assert [text_of(request) for request in good] == [f"{red} a b c #0" for red in range(20, 25)]
        with pytest.raises(InferenceFailedError):
            bad.future.result(TIMEOUT_S)
        assert text_of(harness.caption(40)) == "40 a photo #0"


def test_a_poisoned_pair_fails_alone() -> None:
    with running_engine(started=False) as harness:
        bad = harness.match("9", harness.image(POISON_RED + 1), mode=Mode.ITM)
        good = harness.match("9", harness.image(20), mode=Mode.ITM)
        harness.engine.start()
        assert good.future.result(TIMEOUT_S).value[0].index == 0
        with pytest.raises(InferenceFailedError):
            bad.future.result(TIMEOUT_S)


def test_an_image_that_failed_once_may_be_tried_again() -> None:
    with running_engine() as harness:
        with pytest.raises(InferenceFailedError):
            text_of(harness.caption(POISON_RED))
        retried = ImageInput(f"digest-{POISON_RED}", pixels(50), {})
        assert text_of(harness.caption(0, image=retried)) == "50 a photo #0"


def test_of_two_who_complete_a_request_at_once_one_has_the_last_word_and_the_other_does_nothing() -> None:
    both_looked = threading.Barrier(2)

    class Slow(Future[Answer[int]]):
        """A future whose state both threads read before either acts, where they may read it at once."""

        def done(self) -> bool:
            is_done = super().done()
            with suppress(threading.BrokenBarrierError):
                both_looked.wait(0.2)
            return is_done

    request: Request[int] = Request(MatchInput("a", ("b",), Mode.ITC, 1, 1), future=Slow())
    with ThreadPoolExecutor(2) as threads:
        for ended in [threads.submit(request.fail, NotReadyError("gone")) for _ in range(2)]:
            ended.result(TIMEOUT_S)
    assert isinstance(request.future.exception(), NotReadyError)


def test_a_score_that_is_not_a_number_is_no_answer() -> None:
    with running_engine() as harness, pytest.raises(InferenceFailedError, match="not a number"):
        text_of(harness.caption(1, NAN_WORD))


def test_an_expired_request_never_reaches_the_device() -> None:
    with running_engine(started=False) as harness:
        expired = harness.caption(1, deadline=time.monotonic())
        other = harness.caption(2)
        harness.engine.start()
        text_of(other)
        with pytest.raises(DeadlineExceededError):
            expired.future.result(TIMEOUT_S)
        assert harness.backend.vision_batches == [[2]]


def test_an_abandoned_request_in_the_queue_never_reaches_the_device() -> None:
    with running_engine(started=False) as harness:
        abandoned, other = harness.caption(1), harness.caption(2)
        assert abandoned.future.cancel()
        harness.engine.start()
        text_of(other)
        assert harness.backend.vision_batches == [[2]]
        assert harness.queue.num_items == 0


def test_a_request_abandoned_while_it_runs_leaves_the_decoder() -> None:
    with running_engine() as harness:
        harness.backend.decode_gate.clear()
        request = harness.caption(1, "a b c d e f")
        until(lambda: harness.backend.num_added == 1)
        assert request.future.cancel()
        harness.backend.decode_gate.set()
        until(lambda: harness.engine.num_running == 0)
        with pytest.raises(CancelledError):
            request.future.result(TIMEOUT_S)
        assert text_of(harness.caption(2)) == "2 a photo #0"
        assert harness.backend.num_cancelled == 1


def test_the_heart_beats_while_idle_and_stops_while_the_device_hangs() -> None:
    with running_engine() as harness:
        text_of(harness.caption(1))
        until(lambda: harness.engine.heartbeat_age_s() == 0)
        harness.backend.encode_gate.clear()
        hung = harness.caption(2)
        until(lambda: harness.engine.heartbeat_age_s() > 0.05)
        harness.backend.encode_gate.set()
        text_of(hung)
        until(lambda: harness.engine.heartbeat_age_s() == 0)


def test_a_layer_that_ends_within_a_long_step_is_a_heartbeat() -> None:
    with running_engine() as harness:
        harness.backend.encode_gate.clear()
        request = harness.caption(2)
        until(lambda: harness.engine.heartbeat_age_s() > 0.05)
        harness.backend.last_progress = time.monotonic()
        assert harness.engine.heartbeat_age_s() < 0.05
        until(lambda: harness.engine.heartbeat_age_s() > 0.05)  # no further layer ends
        harness.backend.encode_gate.set()
        text_of(request)


def test_a_request_that_nobody_takes_counts_as_no_progress() -> None:
    with running_engine(started=False) as harness:
        harness.caption(1)
        until(lambda: harness.engine.heartbeat_age_s() > 0.01)
        harness.engine.start()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it is meant to die
def test_where_the_device_is_lost_what_it_ran_must_not_be_retried_and_what_waited_may_be() -> None:
    with running_engine(max_rows=16, started=False) as harness:
        requests = [harness.caption(1, DEADLY_WORD), harness.caption(2, "a b c"), harness.caption(3, "a b c")]
        wide = GenerationParams(num_beams=13)
        later = [harness.caption(4, params=wide) for _ in range(9)]  # eight are admitted ahead of their rows
        harness.engine.start()
        for request in (*requests, *later[:5]):
            with pytest.raises(LostRequestError):
                request.future.result(TIMEOUT_S)
        with pytest.raises(NotReadyError):
            later[-1].future.result(TIMEOUT_S)
        until(lambda: not harness.engine.is_alive)
        with pytest.raises(NotReadyError, match="restarted"):
            harness.queue.make_reservations(1)


def test_stopping_tells_those_in_the_queue_and_those_that_run() -> None:
    with running_engine(max_rows=16) as harness:
        harness.backend.decode_gate.clear()
        running = harness.caption(1, "a b c", params=GenerationParams(num_beams=16))
        until(lambda: harness.engine.num_running == 1)
        waiting = harness.caption(2)
        harness.engine.stop(0)
        harness.backend.decode_gate.set()
        for request in (running, waiting):
            with pytest.raises(NotReadyError):
                request.future.result(TIMEOUT_S)


def test_an_engine_that_was_never_started_can_be_stopped() -> None:
    with running_engine(started=False) as harness:
        waiting = harness.caption(1)
        harness.engine.stop(TIMEOUT_S)
        with pytest.raises(NotReadyError):
            waiting.future.result(TIMEOUT_S)


def test_an_answer_tells_where_its_time_went_and_with_how_many_rows() -> None:
    with running_engine(started=False) as harness:
        requests = [harness.caption(red, "a b", params=GenerationParams(num_beams=4)) for red in (1, 2, 3)]
        harness.engine.start()
        answers = [request.future.result(TIMEOUT_S) for request in requests]
        assert {answer.max_rows for answer in answers} == {12}
        for answer in answers:
            assert answer.times.queue_s > 0
            assert answer.times.vision_s > 0
            assert answer.times.work_s > 0


def test_waiting_for_rows_is_time_in_the_queue_and_not_in_the_decoder() -> None:
    with running_engine(max_rows=16) as harness:
        harness.backend.decode_gate.clear()
        wide = harness.caption(1, "a b", params=GenerationParams(num_beams=16))
        until(lambda: harness.backend.num_added == 1)
        submitted = time.monotonic()
        waiting = harness.caption(2, "a")
        until(lambda: time.monotonic() - submitted > 0.2)
        harness.backend.decode_gate.set()
        assert waiting.future.result(TIMEOUT_S).times.queue_s >= 0.2
        assert waiting.future.result().times.work_s < 0.2
        assert wide.future.result(TIMEOUT_S).times.work_s >= 0.2
        assert wide.future.result().times.queue_s < 0.2


@pytest.mark.parametrize("can_match", [True, False])
def test_a_checkpoint_without_a_head_still_serves_the_other(can_match: bool) -> None:
    backend = FakeBackend(can_generate=not can_match, can_match=can_match)
    with running_engine(backend) as harness:
        if can_match:
            assert len(harness.match("1", "2", "3").future.result(TIMEOUT_S).value) == 2
        else:
            assert text_of(harness.caption(1)) == "1 a photo #0"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it is meant to die
def test_a_device_lost_while_a_request_is_admitted_leaves_nobody_waiting() -> None:
    class Lost(FakeBackend):
        def to_device(self, tensor: Tensor) -> Tensor:
            raise torch.AcceleratorError("the device is lost")

    with running_engine(Lost(), started=False) as harness:
        known = ImageInput("known", None, {EmbeddingKind.QUERY_OUTPUT: torch.zeros(1, 2)})
        admitted, waiting = harness.caption(0, image=known), harness.caption(1)
        harness.engine.start()
        with pytest.raises(LostRequestError):
            admitted.future.result(TIMEOUT_S)
        with pytest.raises(NotReadyError):
            waiting.future.result(TIMEOUT_S)
