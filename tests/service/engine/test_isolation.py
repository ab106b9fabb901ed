"""What a failure in a batch costs the others, over a fake model: nobody else fails, little is done twice."""

import pytest
import torch
from torch import Tensor

from model import GenerationParams
from service.engine.request import ImageInput, Kind, Mode
from service.errors import InferenceFailedError, OutOfDeviceMemoryError
from tests.service.fakes import POISON_RED, POISON_WORD, TIMEOUT_S, FakeBackend, out_of_memory
from tests.service.running import text_of, workshop

BEAMS = GenerationParams(num_beams=3)


def test_a_poisoned_image_in_a_full_batch_is_found_by_halves() -> None:
    with workshop(started=False) as shop:
        good = [shop.caption(red) for red in range(20, 27)]
        bad = shop.caption(POISON_RED)
        shop.engine.start()
        assert [text_of(job) for job in good] == [f"{red} a photo #0" for red in range(20, 27)]
        with pytest.raises(InferenceFailedError):
            bad.ticket.future.result(TIMEOUT_S)
        assert [len(batch) for batch in shop.backend.vision_batches] == [8, 4, 4, 2, 2, 1, 1]


def test_a_poisoned_prompt_in_a_full_batch_is_found_by_halves() -> None:
    with workshop(started=False) as shop:
        good = [shop.caption(red, "a") for red in range(20, 27)]
        bad = shop.caption(30, POISON_WORD)
        shop.engine.start()
        assert [text_of(job) for job in good] == [f"{red} a #0" for red in range(20, 27)]
        with pytest.raises(InferenceFailedError):
            bad.ticket.future.result(TIMEOUT_S)
        assert shop.backend.decode_batches == [8, 4, 4, 2, 2, 1, 1]


def test_a_poisoned_pair_among_pairs_of_others_fails_its_own_job_alone() -> None:
    with workshop(started=False) as shop:
        jobs = [shop.match("9", shop.image(red), mode=Mode.ITM) for red in (20, POISON_RED + 1, 40, 50)]
        shop.engine.start()
        for index in (0, 2, 3):
            assert jobs[index].ticket.future.result(TIMEOUT_S).value[0].index == 0
        with pytest.raises(InferenceFailedError):
            jobs[1].ticket.future.result(TIMEOUT_S)


def test_a_question_that_fails_fails_its_request_and_no_other() -> None:
    with workshop(started=False) as shop:
        bad, good = shop.caption(1, "a", POISON_WORD, "b"), shop.caption(2, "a", "b")
        shop.engine.start()
        with pytest.raises(InferenceFailedError):
            bad.ticket.future.result(TIMEOUT_S)
        assert text_of(good, 1) == "2 b #0"


def test_a_model_that_cannot_be_put_to_work_fails_jobs_instead_of_spinning() -> None:
    class Broken(FakeBackend):
        def build_decoder(self):  # type: ignore[no-untyped-def]
            raise RuntimeError("no decoder today")

    with workshop(Broken(), started=False) as shop:
        jobs = [shop.caption(1), shop.caption(2)]
        shop.engine.start()
        for job in jobs:
            with pytest.raises(InferenceFailedError):
                job.ticket.future.result(TIMEOUT_S)


def test_images_beyond_the_memory_are_encoded_in_smaller_batches_ever_after() -> None:
    with workshop(FakeBackend(memory_rows=3), started=False) as shop:
        jobs = [shop.caption(red) for red in range(20, 36)]
        shop.engine.start()
        assert [text_of(job) for job in jobs] == [f"{red} a photo #0" for red in range(20, 36)]
        sizes = [len(batch) for batch in shop.backend.vision_batches]
        assert sizes[:2] == [8, 4]
        assert max(sizes[2:]) <= 3


def test_texts_beyond_the_memory_run_in_smaller_company_and_all_are_answered() -> None:
    with workshop(FakeBackend(memory_rows=10), started=False) as shop:
        jobs = [shop.caption(1, f"a b {index}", params=BEAMS) for index in range(16)]
        shop.engine.start()
        assert [text_of(job) for job in jobs] == [f"1 a b {index} #0" for index in range(16)]
        num_failed = shop.backend.num_freed
        assert num_failed >= 1
        more = [shop.caption(2, f"c {index}", params=BEAMS) for index in range(4)]
        assert [text_of(job) for job in more] == [f"2 c {index} #0" for index in range(4)]
        assert shop.backend.num_freed == num_failed  # the safe size is remembered


def test_pairs_and_texts_beyond_the_memory_are_scored_in_smaller_batches() -> None:
    with workshop(FakeBackend(memory_rows=4), started=False) as shop:
        jobs = [shop.match(shop.image(100), *map(str, range(start, 20)), mode=Mode.ITM) for start in (0, 5)]
        shop.engine.start()
        assert [len(job.ticket.future.result(TIMEOUT_S).value) for job in jobs] == [20, 15]
        assert max(shop.backend.match_batches[-5:]) <= 4


def test_memory_that_runs_out_while_a_request_is_taken_in_is_told_as_such() -> None:
    class Full(FakeBackend):
        def to_device(self, tensor: Tensor) -> Tensor:
            raise out_of_memory()

    with workshop(Full(), started=False) as shop:
        known = ImageInput("known", None, {Kind.QUERY_OUTPUT: torch.zeros(1, 2)})
        job = shop.caption(0, image=known)
        shop.engine.start()
        with pytest.raises(OutOfDeviceMemoryError, match="images"):
            job.ticket.future.result(TIMEOUT_S)
        assert shop.engine.alive


def test_a_failed_trial_that_cannot_begin_loses_nobody() -> None:
    class Fragile(FakeBackend):
        """Cannot begin a text with the poisoned word."""

        def build_decode_job(self, encoded, prompt_ids, params, question):  # type: ignore[no-untyped-def]
            if POISON_WORD in self.words_of(prompt_ids):
                raise RuntimeError("a poisoned prompt")
            return super().build_decode_job(encoded, prompt_ids, params, question)

    with workshop(Fragile(), started=False) as shop:
        bad = shop.caption(1, POISON_WORD)
        good = [shop.caption(red, "a") for red in range(20, 27)]
        shop.engine.start()
        assert [text_of(job) for job in good] == [f"{red} a #0" for red in range(20, 27)]
        with pytest.raises(InferenceFailedError):
            bad.ticket.future.result(TIMEOUT_S)


def test_after_a_while_more_is_tried_again() -> None:
    backend = FakeBackend(memory_rows=2)
    with workshop(backend, cache_bytes=0) as shop:

        def encode_together(reds: range) -> None:
            backend.encode_gate.clear()
            jobs = [shop.caption(red) for red in reds]
            backend.encode_gate.set()
            for job in jobs:
                text_of(job)

        encode_together(range(20, 36))
        assert max(len(batch) for batch in backend.vision_batches[-3:]) <= 2
        backend.memory_rows = 10**9
        backend.vision_batches.clear()
        for _ in range(20):
            encode_together(range(40, 56))  # others: the log keeps hold of the failed
        assert max(len(batch) for batch in backend.vision_batches) > 2


def test_what_does_not_fit_alone_is_told_so() -> None:
    with workshop(FakeBackend(memory_rows=2), started=False) as shop:
        wide, narrow = shop.caption(1, params=BEAMS), shop.caption(2)
        shop.engine.start()
        with pytest.raises(OutOfDeviceMemoryError, match=r"3 beams.*lower num_beams"):
            wide.ticket.future.result(TIMEOUT_S)
        assert text_of(narrow) == "2 a photo #0"


def test_an_image_that_does_not_fit_alone_is_told_so() -> None:
    with workshop(FakeBackend(memory_rows=0)) as shop, pytest.raises(OutOfDeviceMemoryError, match="image"):
        text_of(shop.caption(1))
    with workshop(FakeBackend(memory_rows=0)) as shop, pytest.raises(OutOfDeviceMemoryError, match="text"):
        shop.match("1", "2").ticket.future.result(TIMEOUT_S)
