"""The limits of rows and bytes: requests beyond them wait, and impossible ones are refused."""

from collections.abc import Sequence

import pytest
import torch

from model import (
    Decoder,
    DecodeRequest,
    DecoderLimits,
    GenerationParams,
    InvalidParamsError,
    InvalidPromptError,
    MemoryRequirement,
    check_fits,
    memory_requirement,
)
from tests.model.generation.mixed_requests import Answers, assert_same_answers, run_alone
from tests.model.generation.reference import Pair


def requirements(requests: Sequence[DecodeRequest]) -> list[MemoryRequirement]:
    return [
        memory_requirement(len(request.language_model_inputs) + len(request.prompt_ids), request.params)
        for request in requests
    ]


def limit_of(pair: Pair, requests: Sequence[DecodeRequest], bound: str) -> DecoderLimits:
    """Return limits that hold some of the requests at once."""
    if bound == "rows":
        return DecoderLimits(max_rows=9)
    kv_bytes = pair.language_model.kv_bytes
    return DecoderLimits(max_kv_bytes=max(kv_bytes([one] * 2) for one in requirements(requests)))


@torch.inference_mode()
@pytest.mark.parametrize("bound", ["rows", "bytes"])
def test_requests_beyond_the_limits_wait_in_their_order_and_answer_as_ever(
    pair: Pair, requests: list[DecodeRequest], bound: str
) -> None:
    limits = limit_of(pair, requests, bound)
    decoder = Decoder(pair.language_model, limits)
    for request in requests:
        decoder.add(request)
    answers: Answers = {}
    started: list[DecodeRequest] = []
    while decoder.num_requests:
        answers.update(decoder.step())
        running = decoder.running_requests
        started += [one for one in requests if one not in started and (one in running or one in answers)]
        assert sum(request.params.num_rows for request in running) <= limits.max_rows
        assert not running or pair.language_model.kv_bytes(requirements(running)) <= limits.max_kv_bytes
    assert started == requests  # first come, first served
    for request in requests:
        assert_same_answers(answers[request], run_alone(pair.language_model, request))


@torch.inference_mode()
@pytest.mark.parametrize("bound", ["rows", "bytes"])
def test_requests_within_the_limits_run_in_the_next_step_and_others_wait(
    pair: Pair, requests: list[DecodeRequest], bound: str
) -> None:
    limits = limit_of(pair, requests, bound)
    decoder = Decoder(pair.language_model, limits)
    fits = []
    for number, request in enumerate(requests, start=1):
        fits.append(not limits.are_exceeded(requirements(requests[:number]), pair.language_model))
        decoder.add(request)
    done = decoder.step()
    num_started = len(done) + len(decoder.running_requests)
    assert fits == [True] * num_started + [False] * (len(requests) - num_started)
    assert 0 < num_started < len(requests)


def test_a_request_that_could_never_run_is_refused_with_the_figures(pair: Pair) -> None:
    request = pair.request(0, "", GenerationParams(num_beams=5, max_new_tokens=20))
    with pytest.raises(
        InvalidParamsError, match="works on 5 beams or samples at once, the limit is 4; lower"
    ):
        Decoder(pair.language_model, DecoderLimits(max_rows=4)).add(request)
    num_bytes = pair.language_model.kv_bytes(requirements([request]))
    decoder = Decoder(pair.language_model, DecoderLimits(max_kv_bytes=num_bytes - 1))
    message = (
        f"5 beams of up to 20 new tokens.*up to {num_bytes} bytes of keys.*limit is {num_bytes - 1}; lower"
    )
    with pytest.raises(InvalidParamsError, match=message):
        decoder.add(request)
    assert decoder.num_requests == 0
    Decoder(pair.language_model, DecoderLimits(max_rows=5, max_kv_bytes=num_bytes)).add(request)


def test_a_request_is_checked_without_a_decoder(pair: Pair) -> None:
    params = GenerationParams(num_beams=5, max_new_tokens=20)

    def check(limits: DecoderLimits, num_prompt_tokens: int = 3) -> None:
        check_fits(
            pair.language_model,
            limits,
            num_prompt_tokens=num_prompt_tokens,
            num_soft_tokens=8,
            params=params,
        )

    check(DecoderLimits(max_rows=5))
    with pytest.raises(InvalidParamsError, match="the limit is 4"):
        check(DecoderLimits(max_rows=4))
    with pytest.raises(InvalidPromptError, match="shorten the prompt"):
        check(DecoderLimits(), num_prompt_tokens=pair.language_model.max_positions)


def test_a_prompt_of_as_many_tokens_as_the_limit_fits_and_one_more_does_not(pair: Pair) -> None:
    limits, params = DecoderLimits(max_prefix_tokens=12), GenerationParams(num_beams=1, max_new_tokens=4)
    check_fits(pair.language_model, limits, num_prompt_tokens=4, num_soft_tokens=8, params=params)
    with pytest.raises(InvalidPromptError, match=r"13 tokens, the limit is 12; shorten"):
        check_fits(pair.language_model, limits, num_prompt_tokens=5, num_soft_tokens=8, params=params)
