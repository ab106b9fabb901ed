"""How many jobs run at once, in rows and in bytes, and what becomes of the others."""

from collections.abc import Sequence

import pytest
import torch

from model import DecodeJob, Decoder, DecoderLimits, GenerationParams, InvalidParamsError
from model.language import Extent
from tests.model.generation.company import Answers, assert_same_answers, run_alone
from tests.model.generation.reference import Pair


def extents(jobs: Sequence[DecodeJob]) -> list[Extent]:
    return [
        Extent(
            len(job.language_model_inputs) + len(job.prompt_ids),
            job.params.num_rows,
            job.params.max_new_tokens,
        )
        for job in jobs
    ]


@torch.inference_mode()
@pytest.mark.parametrize("bound", ["rows", "bytes"])
def test_jobs_wait_for_room_in_their_order_and_answer_as_ever(
    pair: Pair, jobs: list[DecodeJob], bound: str
) -> None:
    state = pair.language_model.build_state()
    limits = DecoderLimits(max_rows=9)
    if bound == "bytes":
        limits = DecoderLimits(max_kv_bytes=max(state.num_bytes([extent] * 2) for extent in extents(jobs)))
    decoder = Decoder(pair.language_model, limits)
    for job in jobs:
        decoder.add(job)
    answers: Answers = {}
    begun: list[DecodeJob] = []
    while decoder.num_jobs:
        answers.update(decoder.step())
        running = [task.job for task in decoder._running]
        begun += [job for job in jobs if job not in begun and (job in running or job in answers)]
        assert sum(job.params.num_rows for job in running) <= limits.max_rows
        assert not running or state.num_bytes(extents(running)) <= limits.max_kv_bytes
    assert begun == jobs  # nobody was overtaken
    for job in jobs:
        assert_same_answers(answers[job], run_alone(pair.language_model, job))


@torch.inference_mode()
@pytest.mark.parametrize("bound", ["rows", "bytes"])
def test_who_is_told_of_room_begins_at_the_next_step_and_who_is_not_waits(
    pair: Pair, jobs: list[DecodeJob], bound: str
) -> None:
    limits = DecoderLimits(max_rows=9)
    if bound == "bytes":
        state = pair.language_model.build_state()
        limits = DecoderLimits(max_kv_bytes=max(state.num_bytes([extent] * 2) for extent in extents(jobs)))
    decoder = Decoder(pair.language_model, limits)
    told = []
    for job in jobs:
        told.append(decoder.has_room(len(job.prompt_ids) + len(job.language_model_inputs), job.params))
        decoder.add(job)
    decoder.step()
    num_begun = len(jobs) - len(decoder._waiting)
    assert told == [True] * num_begun + [False] * (len(jobs) - num_begun)
    assert 0 < num_begun < len(jobs)


def test_a_job_that_could_never_run_is_refused_with_the_figures(pair: Pair) -> None:
    job = pair.job(0, "", GenerationParams(num_beams=5, max_new_tokens=20))
    with pytest.raises(
        InvalidParamsError, match="works on 5 beams or samples at once, the limit is 4; lower"
    ):
        Decoder(pair.language_model, DecoderLimits(max_rows=4)).add(job)
    (extent,) = extents([job])
    needed = pair.language_model.build_state().num_bytes([extent])
    decoder = Decoder(pair.language_model, DecoderLimits(max_kv_bytes=needed - 1))
    with pytest.raises(
        InvalidParamsError,
        match=f"5 beams of up to 20 new tokens.*up to {needed} bytes of keys.*limit is {needed - 1}; lower",
    ):
        decoder.add(job)
    assert decoder.num_jobs == 0
    Decoder(pair.language_model, DecoderLimits(max_rows=5, max_kv_bytes=needed)).add(job)
