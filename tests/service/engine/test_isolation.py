"""Isolation of failures, over a fake model: nobody else fails, little is done twice."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from model import DecodeRequest, EmbeddingKind, GenerationParams
from model.errors import DeviceLostError
from service.engine.image_pool import ImageInput
from service.engine.request import Mode
from service.errors import InferenceFailedError, LostRequestError, OutOfDeviceMemoryError
from service.model_backend import EncoderId
from tests.service.fakes import (
    POISON_RED,
    POISON_WORD,
    TIMEOUT_S,
    FakeBackend,
    FakeDecoder,
    out_of_memory,
)
from tests.service.running import running_engine, text_of, until

BEAMS = GenerationParams(num_beams=3)


@contextmanager
def no_log_records() -> Iterator[None]:
    """Keep pytest from recording errors, whose tracebacks would hold the images."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def test_a_poisoned_image_in_a_full_batch_is_found_by_halves() -> None:
    with running_engine(started=False) as harness:
        good = [harness.caption(red) for red in range(20, 27)]
        bad = harness.caption(POISON_RED)
        harness.engine.start()
        assert [text_of(request) for request in good] == [f"{red} a photo #0" for red in range(20, 27)]
        with pytest.raises(InferenceFailedError):
            bad.future.result(TIMEOUT_S)
        assert [len(batch) for batch in harness.backend.vision_batches] == [8, 4, 4, 2, 2, 1, 1]


def test_a_poisoned_prompt_in_a_full_batch_is_found_by_halves() -> None:
    with running_engine(started=False) as harness:
        good = [harness.caption(red, "a") for red in range(20, 27)]
        bad = harness.caption(30, POISON_WORD)
        harness.engine.start()
        assert [text_of(request) for request in good] == [f"{red} a #0" for red in range(20, 27)]
        with pytest.raises(InferenceFailedError):
            bad.future.result(TIMEOUT_S)
        assert harness.backend.decode_batches == [8, 4, 4, 2, 2, 1, 1]


def test_a_poisoned_pair_among_pairs_of_others_fails_its_own_request_alone() -> None:
    with running_engine(started=False) as harness:
        requests = [
            harness.match("9", harness.image(red), mode=Mode.ITM) for red in (20, POISON_RED + 1, 40, 50)
        ]
        harness.engine.start()
        for index in (0, 2, 3):
            assert requests[index].future.result(TIMEOUT_S).value[0].index == 0
        with pytest.raises(InferenceFailedError):
            requests[1].future.result(TIMEOUT_S)


def test_a_question_that_fails_fails_its_request_and_no_other() -> None:
    with running_engine(started=False) as harness:
        bad, good = harness.caption(1, "a", POISON_WORD, "b"), harness.caption(2, "a", "b")
        harness.engine.start()
        with pytest.raises(InferenceFailedError):
            bad.future.result(TIMEOUT_S)
        assert text_of(good, 1) == "2 b #0"


def test_a_model_that_cannot_be_put_to_work_fails_requests_instead_of_spinning() -> None:
    class Broken(FakeBackend):
        def build_decoder(self):  # type: ignore[no-untyped-def]
            raise RuntimeError("no decoder today")

    with running_engine(Broken(), started=False) as harness:
        requests = [harness.caption(1), harness.caption(2)]
        harness.engine.start()
        for request in requests:
            with pytest.raises(InferenceFailedError):
                request.future.result(TIMEOUT_S)


def test_images_beyond_the_memory_are_encoded_in_smaller_batches_ever_after() -> None:
    with running_engine(FakeBackend(memory_rows=3), started=False) as harness:
        requests = [harness.caption(red) for red in range(20, 36)]
        harness.engine.start()
        assert [text_of(request) for request in requests] == [f"{red} a photo #0" for red in range(20, 36)]
        sizes = [len(batch) for batch in harness.backend.vision_batches]
        assert sizes[:2] == [8, 4]
        assert max(sizes[2:]) <= 3


def test_texts_beyond_the_memory_run_in_smaller_company_and_all_are_answered() -> None:
    with running_engine(FakeBackend(memory_rows=10), started=False) as harness:
        requests = [harness.caption(1, f"a b {index}", params=BEAMS) for index in range(16)]
        harness.engine.start()
        assert [text_of(request) for request in requests] == [f"1 a b {index} #0" for index in range(16)]
        num_failed = harness.backend.num_freed
        assert num_failed >= 1
        more = [harness.caption(2, f"c {index}", params=BEAMS) for index in range(4)]
        assert [text_of(request) for request in more] == [f"2 c {index} #0" for index in range(4)]
        assert harness.backend.num_freed == num_failed  # the safe size is remembered


def test_pairs_and_texts_beyond_the_memory_are_scored_in_smaller_batches() -> None:
    with running_engine(FakeBackend(memory_rows=4), started=False) as harness:
        requests = [
            harness.match(harness.image(100), *map(str, range(start, 20)), mode=Mode.ITM) for start in (0, 5)
        ]
        harness.engine.start()
        assert [len(request.future.result(TIMEOUT_S).value) for request in requests] == [20, 15]
        assert max(harness.backend.match_batches[-5:]) <= 4


def test_memory_that_runs_out_while_a_request_is_admitted_is_told_as_such() -> None:
    class Full(FakeBackend):
        def to_device(self, tensor: Tensor) -> Tensor:
            raise out_of_memory()

    with running_engine(Full(), started=False) as harness:
        known = ImageInput("known", None, {EmbeddingKind.QUERY_OUTPUT: torch.zeros(1, 2)})
        request = harness.caption(0, image=known)
        harness.engine.start()
        with pytest.raises(OutOfDeviceMemoryError, match="images"):
            request.future.result(TIMEOUT_S)
        assert harness.engine.is_alive


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it is meant to die
def test_a_device_that_is_lost_under_the_message_of_missing_memory_ends_the_engine() -> None:
    class Lost(FakeBackend):
        def free_memory(self) -> None:
            raise DeviceLostError("the device fails at a product of 2 x 2")

    with running_engine(Lost(memory_rows=1), started=False) as harness:
        requests = [harness.caption(red) for red in (20, 21)]
        harness.engine.start()
        for request in requests:
            with pytest.raises(LostRequestError):
                request.future.result(TIMEOUT_S)
        until(lambda: not harness.engine.is_alive)


def test_a_failed_trial_that_cannot_begin_loses_nobody() -> None:
    class Fragile(FakeBackend):
        """Cannot begin a text with the poisoned word."""

        def build_decode_request(self, encoded, prompt_ids, params, question):  # type: ignore[no-untyped-def]
            if POISON_WORD in self.words_of(prompt_ids):
                raise RuntimeError("a poisoned prompt")
            return super().build_decode_request(encoded, prompt_ids, params, question)

    with running_engine(Fragile(), started=False) as harness:
        bad = harness.caption(1, POISON_WORD)
        good = [harness.caption(red, "a") for red in range(20, 27)]
        harness.engine.start()
        assert [text_of(request) for request in good] == [f"{red} a #0" for red in range(20, 27)]
        with pytest.raises(InferenceFailedError):
            bad.future.result(TIMEOUT_S)


def test_after_a_while_more_is_tried_again() -> None:
    backend = FakeBackend(memory_rows=2)
    with running_engine(backend, cache_bytes=0) as harness:

        def encode_together(reds: range) -> None:
            backend.encode_gate.clear()
            requests = [harness.caption(red) for red in reds]
            backend.encode_gate.set()
            for request in requests:
                text_of(request)

        encode_together(range(20, 36))
        assert max(len(batch) for batch in backend.vision_batches[-3:]) <= 2
        backend.memory_rows = 10**9
        backend.vision_batches.clear()
        for _ in range(20):
            encode_together(range(40, 56))  # others: the log keeps hold of the failed
        assert max(len(batch) for batch in backend.vision_batches) > 2


def test_what_does_not_fit_alone_gets_its_own_error() -> None:
    with running_engine(FakeBackend(memory_rows=2), started=False) as harness:
        wide, narrow = harness.caption(1, params=BEAMS), harness.caption(2)
        harness.engine.start()
        with pytest.raises(OutOfDeviceMemoryError, match=r"3 beams.*lower num_beams"):
            wide.future.result(TIMEOUT_S)
        assert text_of(narrow) == "2 a photo #0"


def test_an_image_that_does_not_fit_alone_gets_its_own_error() -> None:
    with (
        running_engine(FakeBackend(memory_rows=0)) as harness,
        pytest.raises(OutOfDeviceMemoryError, match="image"),
    ):
        text_of(harness.caption(1))
    with (
        running_engine(FakeBackend(memory_rows=0)) as harness,
        pytest.raises(OutOfDeviceMemoryError, match="text"),
    ):
        harness.match("1", "2").future.result(TIMEOUT_S)


def test_images_of_a_bisection_are_freed_when_their_callers_leave() -> None:
    class Held(FakeBackend):
        """Waits for the gate in the second image batch, which is a half of the first."""

        def encode_images(self, pixels: Tensor, encoder: EncoderId) -> Tensor:
            if self.vision_batches:
                self.encode_gate.clear()
            return super().encode_images(pixels, encoder)

    backend = Held()
    with no_log_records(), running_engine(backend, started=False) as harness:
        requests = [harness.caption(red) for red in (POISON_RED, *range(20, 27))]
        harness.engine.start()
        until(lambda: backend.vision_batches and not backend.encode_gate.is_set())
        for request in requests:
            request.future.cancel()
        backend.encode_gate.set()
        until(lambda: harness.engine.num_running == 0)
        until(lambda: harness.engine.num_images == 0)


def test_memory_that_runs_out_while_sequences_are_cancelled_does_not_shrink_the_batches() -> None:
    class Fragile(FakeBackend):
        """Runs out of memory when the first sequence is cancelled."""

        def build_decoder(self) -> FakeDecoder:
            return FragileDecoder(self)

    class FragileDecoder(FakeDecoder):
        def cancel(self, request: DecodeRequest) -> None:
            super().cancel(request)
            if backend.num_cancelled == 1:
                raise out_of_memory()

    backend = Fragile()
    with running_engine(backend) as harness:
        backend.decode_gate.clear()
        abandoned = harness.caption(1, "a b c d e f")
        until(lambda: backend.num_added == 1)
        assert abandoned.future.cancel()
        backend.decode_gate.set()
        until(lambda: backend.num_freed == 1)
        backend.decode_batches.clear()
        later = harness.caption(
            2, *(f"a b {index}" for index in range(8))
        )  # eight sequences that join together
        assert [text_of(later, index) for index in range(8)] == [f"2 a b {index} #0" for index in range(8)]
        assert max(backend.decode_batches) == 8
