"""Continuous batching: an answer never depends on who shares the batch, joins it or leaves it."""

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import (
    DecodeJob,
    Decoder,
    GenerationParams,
    InvalidParamsError,
    InvalidPromptError,
)
from model.language import DecodingState, Extent, LanguageModel, Rows
from model.language.per_beam_state import PlainState
from tests.builders import MAX_POSITIONS, NUM_QUERY_TOKENS, build_language_model
from tests.builders_t5 import build_t5_language_model
from tests.model.generation.company import PARAMS, Answers, assert_same_answers, run_alone
from tests.model.generation.reference import Pair


@torch.inference_mode()
def test_jobs_with_unequal_prompts_and_parameters_answer_as_alone(pair: Pair, jobs: list[DecodeJob]) -> None:
    decoder = Decoder(pair.language_model)
    for job in jobs:
        decoder.add(job)
    answers: Answers = {}
    while decoder.num_jobs:
        answers.update(decoder.step())
    assert len(answers) == len(jobs)
    for job in jobs:
        assert_same_answers(answers[job], run_alone(pair.language_model, job))


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(3))
def test_jobs_that_join_later_and_jobs_that_are_cancelled_change_nobodys_answer(
    pair: Pair, jobs: list[DecodeJob], seed: int
) -> None:
    chance = random.Random(seed)
    chance.shuffle(jobs)
    cancelled = set(chance.sample(jobs, 5))
    decoder = Decoder(pair.language_model)
    waiting, to_cancel = list(jobs), list(cancelled)
    answers: Answers = {}
    while waiting or decoder.num_jobs:
        for _ in range(min(chance.randint(0, 4), len(waiting))):
            decoder.add(waiting.pop())
        if to_cancel and chance.random() < 0.5:
            decoder.cancel(to_cancel.pop())
        answers.update(decoder.step())
    for job in jobs:
        if job not in cancelled:
            assert_same_answers(answers[job], run_alone(pair.language_model, job))


@torch.inference_mode()
def test_jobs_on_the_plain_way_join_and_are_cancelled_without_harm(
    pair: Pair, jobs: list[DecodeJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [run_alone(pair.language_model, job) for job in jobs]
    family = pair.language_model._family
    monkeypatch.setattr(
        pair.language_model, "build_state", lambda: PlainState(pair.language_model.llm, family)
    )
    chance = random.Random(0)
    decoder, waiting = Decoder(pair.language_model), list(jobs)
    answers: Answers = {}
    cancelled: set[DecodeJob] = set()
    while waiting or decoder.num_jobs:
        for _ in range(min(chance.randint(0, 6), len(waiting))):
            decoder.add(waiting.pop())
        answers.update(decoder.step())
        for task in chance.sample(decoder._running, min(2, len(decoder._running) // 3)):
            decoder.cancel(task.job)  # more than one between two steps
            cancelled.add(task.job)
    assert cancelled
    assert answers
    for job, alone in zip(jobs, expected, strict=True):
        if job not in cancelled:
            assert_same_answers(answers[job], alone)


class RecordingLanguageModel:
    """A language model that notes how many rows each pass had."""

    def __init__(self, language_model: LanguageModel) -> None:
        self._language_model = language_model
        self.rows: list[int] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._language_model, name)

    def build_state(self) -> DecodingState:
        return RecordingState(self._language_model.build_state(), self.rows)


class RecordingState:
    def __init__(self, state: DecodingState, rows: list[int]) -> None:
        self._state = state
        self._rows = rows

    def __getattr__(self, name: str) -> object:
        return getattr(self._state, name)

    def admit(self, prefixes: Sequence[torch.Tensor], extents: Sequence[Extent]) -> torch.Tensor:
        self._rows.append(len(prefixes))
        return self._state.admit(prefixes, extents)

    def advance(self, rows: Rows) -> torch.Tensor:
        self._rows.append(len(rows))
        return self._state.advance(rows)


@torch.inference_mode()
def test_a_job_is_read_in_one_row_whatever_the_number_of_its_beams(pair: Pair) -> None:
    recording = RecordingLanguageModel(pair.language_model)
    decoder = Decoder(recording)
    for beams in (5, 3):
        decoder.add(pair.job(0, "", GenerationParams(num_beams=beams, max_new_tokens=8, min_new_tokens=8)))
    decoder.step()
    decoder.step()
    assert recording.rows == [2, 8]


@torch.inference_mode()
def test_rows_of_finished_and_cancelled_jobs_leave_with_the_next_step(pair: Pair) -> None:
    recording = RecordingLanguageModel(pair.language_model)
    decoder = Decoder(recording)
    short, long, doomed = (
        pair.job(0, "", GenerationParams(num_beams=beams, max_new_tokens=length, min_new_tokens=length))
        for beams, length in ((5, 2), (3, 6), (4, 6))
    )
    for job in (short, long, doomed):
        decoder.add(job)
    assert [decoder.num_jobs, decoder.num_rows] == [3, 12]
    decoder.step()
    assert [job for job, _ in decoder.step()] == [short]
    assert [decoder.num_jobs, decoder.num_rows] == [2, 7]
    decoder.cancel(doomed)
    assert [decoder.num_jobs, decoder.num_rows] == [1, 3]
    decoder.step()
    assert recording.rows == [3, 12, 3]


@torch.inference_mode()
def test_a_job_cancelled_while_it_waits_is_never_read(pair: Pair) -> None:
    recording = RecordingLanguageModel(pair.language_model)
    decoder = Decoder(recording)
    job = pair.job(0, "", GenerationParams())
    decoder.add(job)
    decoder.cancel(job)
    assert decoder.step() == []
    assert recording.rows == []


def test_cancelling_a_job_nobody_runs_does_nothing(pair: Pair) -> None:
    decoder = Decoder(pair.language_model)
    decoder.cancel(pair.job(0, "", GenerationParams()))
    assert decoder.num_jobs == 0


def job_without_words(language_model: LanguageModel, *, max_new_tokens: int) -> DecodeJob:
    soft_tokens = torch.zeros(NUM_QUERY_TOKENS, language_model.hidden_size)
    return DecodeJob(
        soft_tokens, language_model.tokenize(""), GenerationParams(max_new_tokens=max_new_tokens)
    )


def test_image_tokens_prompt_and_answer_must_fit_the_positions_together() -> None:
    language_model = build_language_model()
    decoder = Decoder(language_model)
    room = MAX_POSITIONS - NUM_QUERY_TOKENS - 1  # the prompt is the beginning-of-text token alone
    decoder.add(job_without_words(language_model, max_new_tokens=room))
    message = (
        f"1 tokens; with {NUM_QUERY_TOKENS} image tokens and up to {room + 1} new tokens "
        f"that makes {MAX_POSITIONS + 1}, the limit is {MAX_POSITIONS}"
    )
    with pytest.raises(InvalidPromptError, match=message):
        decoder.add(job_without_words(language_model, max_new_tokens=room + 1))
    assert decoder.num_jobs == 1


def test_an_answer_of_its_own_sequence_must_fit_the_positions_by_itself() -> None:
    language_model = build_t5_language_model("tied")
    decoder = Decoder(language_model)
    decoder.add(job_without_words(language_model, max_new_tokens=MAX_POSITIONS))
    with pytest.raises(
        InvalidParamsError, match=f"max_new_tokens is {MAX_POSITIONS + 1}.*at most {MAX_POSITIONS} tokens"
    ):
        decoder.add(job_without_words(language_model, max_new_tokens=MAX_POSITIONS + 1))
    assert decoder.num_jobs == 1


@torch.inference_mode()
def test_an_answer_may_fill_the_last_position(pair: Pair) -> None:
    room = MAX_POSITIONS if pair.is_encoder_decoder else MAX_POSITIONS - NUM_QUERY_TOKENS - 1
    params = GenerationParams(num_beams=2, max_new_tokens=room, min_new_tokens=room)
    (answer,) = run_alone(pair.language_model, pair.job(0, "", params))
    assert answer.num_tokens == room
    assert answer.finish_reason == "length"


def test_wrong_parameters_are_refused_before_the_job_is_taken_in(pair: Pair) -> None:
    decoder = Decoder(pair.language_model)
    with pytest.raises(InvalidParamsError):
        decoder.add(pair.job(0, "", GenerationParams(num_beams=0)))
    assert decoder.num_jobs == 0


@torch.inference_mode()
def test_each_token_is_told_with_its_log_probability_and_they_make_the_score(pair: Pair) -> None:
    for params in PARAMS:
        for answer in run_alone(pair.language_model, pair.job(1, "a photo of", params)):
            assert len(answer.log_probs) == answer.num_tokens
            score = sum(answer.log_probs) / answer.num_tokens**params.length_penalty
            assert answer.score == pytest.approx(score, rel=1e-5, abs=1e-4)


@torch.inference_mode()
def test_the_log_probabilities_of_an_answer_without_rules_are_those_of_the_bare_model(pair: Pair) -> None:
    (best, *_) = run_alone(pair.language_model, pair.job(2, "", PARAMS[0]))
    whole = pair.log_probability(2, "", best.token_ids)
    assert sum(best.log_probs) == pytest.approx(whole, abs=1e-4)
    first = pair.log_probability(2, "", best.token_ids[:1])
    assert best.log_probs[0] == pytest.approx(first, abs=1e-4)


@torch.inference_mode()
def test_an_answer_of_one_beam_can_be_read_token_by_token(pair: Pair) -> None:
    decoder = Decoder(pair.language_model)
    job = pair.job(0, "a photo of", GenerationParams(num_beams=1, max_new_tokens=8, min_new_tokens=8))
    decoder.add(pair.job(1, "", PARAMS[0]))
    decoder.add(job)
    assert decoder.token_ids(job) == ()
    read = []
    answers: Answers = {}
    while job not in answers:
        answers.update(decoder.step())
        read.append(decoder.token_ids(job))
    whole = answers[job][0].token_ids
    assert read[:-1] == [whole[: at + 1] for at in range(len(whole) - 1)]


class Operations(TorchDispatchMode):
    """Notes the operations that are launched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def test_no_operation_of_a_step_makes_the_host_wait_for_a_value(pair: Pair, jobs: list[DecodeJob]) -> None:
    decoder = Decoder(pair.language_model)
    for job in jobs:
        decoder.add(job)
    with Operations() as operations:
        while decoder.num_jobs:
            decoder.step()
    assert "topk" in operations.names
    # Each reads a value, or a size that depends on values, off the device.
    assert not operations.names & {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}


@torch.inference_mode()
def test_a_job_whose_scores_are_no_numbers_harms_nobody_and_says_so(pair: Pair) -> None:
    bad = pair.job(0, "", GenerationParams(num_beams=3, max_new_tokens=5))
    bad = dataclasses.replace(
        bad, language_model_inputs=torch.full_like(bad.language_model_inputs, torch.nan)
    )
    good = [pair.job(image, "a photo of", PARAMS[0]) for image in range(3)]
    decoder = Decoder(pair.language_model)
    answers: Answers = {}
    for job in (good[0], bad, *good[1:]):
        decoder.add(job)
    while decoder.num_jobs:
        answers.update(decoder.step())
    assert answers[bad]
    assert all(math.isnan(answer.score) for answer in answers[bad])
    for job in good:
        assert_same_answers(answers[job], run_alone(pair.language_model, job))
