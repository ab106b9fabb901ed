"""Continuous batching: an answer never depends on who shares the batch, joins it or leaves it."""

import random
from collections.abc import Sequence

import pytest
import torch

from model import (
    DecodeJob,
    Decoder,
    Generation,
    GenerationParams,
    InvalidParamsError,
    InvalidPromptError,
)
from model.language import DecodingState, LanguageModel, Rows
from tests.builders import MAX_POSITIONS, NUM_QUERY_TOKENS, build_language_model
from tests.builders_t5 import build_t5_language_model
from tests.model.decoding.reference import PROMPTS, Pair

PARAMS = (
    GenerationParams(num_beams=5, num_return_sequences=5, max_new_tokens=12),
    GenerationParams(num_beams=3, num_return_sequences=2, max_new_tokens=7, length_penalty=-1.0),
    GenerationParams(num_beams=1, max_new_tokens=10),
    GenerationParams(num_beams=1, max_new_tokens=9, do_sample=True, num_return_sequences=3, seed=3),
    GenerationParams(num_beams=4, max_new_tokens=14, repetition_penalty=1.3, no_repeat_ngram_size=2),
    GenerationParams(num_beams=2, max_new_tokens=1, early_stopping=True),
)
Answers = dict[DecodeJob, tuple[Generation, ...]]


@pytest.fixture
def jobs(pair: Pair) -> list[DecodeJob]:
    """Every parameter set with every prompt, on different images."""
    return [
        pair.job((number + offset) % 4, prompt, params)
        for number, params in enumerate(PARAMS)
        for offset, prompt in enumerate(PROMPTS)
    ]


@torch.inference_mode()
def run_alone(language_model: LanguageModel, job: DecodeJob) -> tuple[Generation, ...]:
    decoder = Decoder(language_model)
    decoder.add(job)
    answers: Answers = {}
    while decoder.num_jobs:
        answers.update(decoder.step())
    return answers[job]


def assert_same_answers(together: tuple[Generation, ...], alone: tuple[Generation, ...]) -> None:
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    expected = [answer.score for answer in alone]
    assert [answer.score for answer in together] == pytest.approx(expected, rel=1e-5, abs=1e-5)


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

    def admit(self, prefixes: Sequence[torch.Tensor], widths: Sequence[int]) -> torch.Tensor:
        self._rows.append(len(prefixes))
        return self._state.admit(prefixes, widths)

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
