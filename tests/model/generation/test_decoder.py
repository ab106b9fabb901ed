"""Continuous batching: a generation never depends on the other requests of the batch."""

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import (
    Decoder,
    DecodeRequest,
    GenerationParams,
    InvalidParamsError,
    InvalidPromptError,
)
from model.language import DecodeInput, DecodingState, LanguageModel, MemoryRequirement
from model.language.encoder_decoder import RELATIVE_POSITIONS
from model.language.per_beam_state import PerBeamState
from tests.builders import MAX_POSITIONS, NUM_QUERY_TOKENS, build_language_model
from tests.builders_t5 import build_t5_language_model
from tests.model.generation.mixed_requests import PARAMS, Answers, assert_same_answers, run_alone
from tests.model.generation.reference import Pair


@torch.inference_mode()
def test_requests_with_unequal_prompts_and_parameters_answer_as_alone(
    pair: Pair, requests: list[DecodeRequest]
) -> None:
    decoder = Decoder(pair.language_model)
    for request in requests:
        decoder.add(request)
    answers: Answers = {}
    while decoder.num_requests:
        answers.update(decoder.step())
    assert len(answers) == len(requests)
    for request in requests:
        assert_same_answers(answers[request], run_alone(pair.language_model, request))


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(3))
def test_requests_that_join_later_and_requests_that_are_cancelled_change_no_answer(
    pair: Pair, requests: list[DecodeRequest], seed: int
) -> None:
    chance = random.Random(seed)
    chance.shuffle(requests)
    cancelled = set(chance.sample(requests, 5))
    decoder = Decoder(pair.language_model)
    waiting, to_cancel = list(requests), list(cancelled)
    answers: Answers = {}
    while waiting or decoder.num_requests:
        for _ in range(min(chance.randint(0, 4), len(waiting))):
            decoder.add(waiting.pop())
        if to_cancel and chance.random() < 0.5:
            decoder.cancel(to_cancel.pop())
        answers.update(decoder.step())
    for request in requests:
        if request not in cancelled:
            assert_same_answers(answers[request], run_alone(pair.language_model, request))


@torch.inference_mode()
def test_requests_with_a_cache_per_beam_join_and_are_cancelled_without_harm(
    pair: Pair, requests: list[DecodeRequest]
) -> None:
    expected = [run_alone(pair.language_model, request) for request in requests]
    chance = random.Random(0)
    state = PerBeamState(pair.language_model.model_family)
    decoder, waiting = Decoder(pair.language_model, state=state), list(requests)
    answers: Answers = {}
    cancelled: set[DecodeRequest] = set()
    while waiting or decoder.num_requests:
        for _ in range(min(chance.randint(0, 6), len(waiting))):
            decoder.add(waiting.pop())
        answers.update(decoder.step())
        running = decoder.running_requests
        for request in chance.sample(running, min(2, len(running) // 3)):
            decoder.cancel(request)  # more than one between two steps
            cancelled.add(request)
    assert cancelled
    assert answers
    for request, alone in zip(requests, expected, strict=True):
        if request not in cancelled:
            assert_same_answers(answers[request], alone)


class RecordingState:
    """A decoding state that records the number of rows of each pass."""

    def __init__(self, state: DecodingState) -> None:
        self.num_rows: list[int] = []
        self._state = state

    def prefill(
        self, prefixes: Sequence[torch.Tensor], requirements: Sequence[MemoryRequirement]
    ) -> torch.Tensor:
        self.num_rows.append(len(prefixes))
        return self._state.prefill(prefixes, requirements)

    def decode_step(self, inputs: DecodeInput) -> torch.Tensor:
        self.num_rows.append(len(inputs))
        return self._state.decode_step(inputs)

    def permute(self, order: Sequence[int]) -> None:
        self._state.permute(order)


@torch.inference_mode()
def test_a_request_is_prefilled_in_one_row_whatever_the_number_of_its_beams(pair: Pair) -> None:
    recording = RecordingState(pair.language_model.build_state())
    decoder = Decoder(pair.language_model, state=recording)
    for beams in (5, 3):
        decoder.add(
            pair.request(0, "", GenerationParams(num_beams=beams, max_new_tokens=8, min_new_tokens=8))
        )
    decoder.step()
    decoder.step()
    assert recording.num_rows == [2, 8]


@torch.inference_mode()
def test_rows_of_finished_and_cancelled_requests_leave_with_the_next_step(pair: Pair) -> None:
    recording = RecordingState(pair.language_model.build_state())
    decoder = Decoder(pair.language_model, state=recording)
    short, long, doomed = (
        pair.request(0, "", GenerationParams(num_beams=beams, max_new_tokens=length, min_new_tokens=length))
        for beams, length in ((5, 2), (3, 6), (4, 6))
    )
    for request in (short, long, doomed):
        decoder.add(request)
    assert [decoder.num_requests, decoder.num_rows] == [3, 12]
    decoder.step()
    assert [request for request, _ in decoder.step()] == [short]
    assert [decoder.num_requests, decoder.num_rows] == [2, 7]
    decoder.cancel(doomed)
    assert [decoder.num_requests, decoder.num_rows] == [1, 3]
    decoder.step()
    assert recording.num_rows == [3, 12, 3]


@torch.inference_mode()
def test_a_request_cancelled_while_it_waits_is_never_prefilled(pair: Pair) -> None:
    recording = RecordingState(pair.language_model.build_state())
    decoder = Decoder(pair.language_model, state=recording)
    request = pair.request(0, "", GenerationParams())
    decoder.add(request)
    decoder.cancel(request)
    assert decoder.step() == []
    assert recording.num_rows == []


def test_cancelling_a_request_nobody_runs_does_nothing(pair: Pair) -> None:
    decoder = Decoder(pair.language_model)
    decoder.cancel(pair.request(0, "", GenerationParams()))
    assert decoder.num_requests == 0


def request_without_words(language_model: LanguageModel, *, max_new_tokens: int) -> DecodeRequest:
    soft_tokens = torch.zeros(NUM_QUERY_TOKENS, language_model.hidden_size)
    return DecodeRequest(
        soft_tokens, language_model.tokenize(""), GenerationParams(max_new_tokens=max_new_tokens)
    )


def test_image_tokens_prompt_and_answer_must_fit_the_positions_together() -> None:
    language_model = build_language_model()
    decoder = Decoder(language_model)
    max_new_tokens = MAX_POSITIONS - NUM_QUERY_TOKENS - 1  # the prompt is the beginning-of-text token alone
    decoder.add(request_without_words(language_model, max_new_tokens=max_new_tokens))
    message = (
        f"1 tokens; with {NUM_QUERY_TOKENS} image tokens and up to {max_new_tokens + 1} new tokens "
        f"that makes {MAX_POSITIONS + 1}, the limit is {MAX_POSITIONS}"
    )
    with pytest.raises(InvalidPromptError, match=message):
        decoder.add(request_without_words(language_model, max_new_tokens=max_new_tokens + 1))
    assert decoder.num_requests == 1


def test_an_answer_of_its_own_sequence_must_fit_its_limit_by_itself() -> None:
    language_model = build_t5_language_model("tied")
    decoder = Decoder(language_model)
    decoder.add(request_without_words(language_model, max_new_tokens=RELATIVE_POSITIONS))
    with pytest.raises(
        InvalidParamsError,
        match=f"max_new_tokens is {RELATIVE_POSITIONS + 1}.*at most {RELATIVE_POSITIONS} tokens",
    ):
        decoder.add(request_without_words(language_model, max_new_tokens=RELATIVE_POSITIONS + 1))
    assert decoder.num_requests == 1


@torch.inference_mode()
def test_an_answer_may_fill_the_last_position(pair: Pair) -> None:
    max_new_tokens = MAX_POSITIONS if pair.is_encoder_decoder else MAX_POSITIONS - NUM_QUERY_TOKENS - 1
    params = GenerationParams(num_beams=2, max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens)
    (answer,) = run_alone(pair.language_model, pair.request(0, "", params))
    assert answer.num_tokens == max_new_tokens
    assert answer.finish_reason == "length"


def test_wrong_parameters_are_refused_before_the_request_is_added(pair: Pair) -> None:
    decoder = Decoder(pair.language_model)
    with pytest.raises(InvalidParamsError):
        decoder.add(pair.request(0, "", GenerationParams(num_beams=0)))
    assert decoder.num_requests == 0


@torch.inference_mode()
def test_each_token_has_its_log_probability_and_their_sum_makes_the_score(pair: Pair) -> None:
    for params in PARAMS:
        for answer in run_alone(pair.language_model, pair.request(1, "a photo of", params)):
            assert len(answer.log_probs) == answer.num_tokens
            score = sum(answer.log_probs) / answer.num_tokens**params.length_penalty
            assert answer.score == pytest.approx(score, rel=1e-5, abs=1e-4)


@torch.inference_mode()
def test_the_log_probabilities_of_an_answer_without_rules_are_those_of_the_bare_model(pair: Pair) -> None:
    (best, *_) = run_alone(pair.language_model, pair.request(2, "", PARAMS[0]))
    whole = pair.log_probability(2, "", best.token_ids)
    assert sum(best.log_probs) == pytest.approx(whole, abs=1e-4)
    first = pair.log_probability(2, "", best.token_ids[:1])
    assert best.log_probs[0] == pytest.approx(first, abs=1e-4)


@torch.inference_mode()
def test_an_answer_of_one_beam_can_be_read_token_by_token(pair: Pair) -> None:
    decoder = Decoder(pair.language_model)
    request = pair.request(0, "a photo of", GenerationParams(num_beams=1, max_new_tokens=8, min_new_tokens=8))
    decoder.add(pair.request(1, "", PARAMS[0]))
    decoder.add(request)
    assert decoder.token_ids(request) == ()
    generated: list[tuple[int, ...]] = []
    answers: Answers = {}
    while request not in answers:
        answers.update(decoder.step())
        generated.append(decoder.token_ids(request))
    whole = answers[request][0].token_ids
    assert generated[:-1] == [whole[: end + 1] for end in range(len(whole) - 1)]


class Operations(TorchDispatchMode):
    """Records the operations that are launched."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def test_no_operation_of_a_step_makes_the_host_wait_for_a_value(
    pair: Pair, requests: list[DecodeRequest]
) -> None:
    decoder = Decoder(pair.language_model)
    for request in requests:
        decoder.add(request)
    with Operations() as operations:
        while decoder.num_requests:
            decoder.step()
    assert "topk" in operations.names
    # Each reads a value, or a size that depends on values, off the device.
    assert not operations.names & {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}


@torch.inference_mode()
def test_a_request_whose_scores_are_no_numbers_harms_no_other_and_shows_it(pair: Pair) -> None:
    bad = pair.request(0, "", GenerationParams(num_beams=3, max_new_tokens=5))
    bad = dataclasses.replace(
        bad, language_model_inputs=torch.full_like(bad.language_model_inputs, torch.nan)
    )
    good = [pair.request(image, "a photo of", PARAMS[0]) for image in range(3)]
    decoder = Decoder(pair.language_model)
    answers: Answers = {}
    for request in (good[0], bad, *good[1:]):
        decoder.add(request)
    while decoder.num_requests:
        answers.update(decoder.step())
    assert answers[bad]
    assert all(math.isnan(answer.score) for answer in answers[bad])
    for request in good:
        assert_same_answers(answers[request], run_alone(pair.language_model, request))
