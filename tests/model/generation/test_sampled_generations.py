"""Greedy search and sampling: the reference's tokens, and draws that depend on the seed alone."""

import dataclasses

import pytest
import torch

from model import Decoder, DecodeRequest, Generation, GenerationParams
from tests.model.generation.reference import PROMPTS, Pair, label

GREEDY = GenerationParams(num_beams=1, max_new_tokens=15)
SAMPLED = GenerationParams(num_beams=1, max_new_tokens=15, do_sample=True, seed=7)
GREEDY_CASES = [
    GREEDY,
    dataclasses.replace(GREEDY, min_new_tokens=8),
    dataclasses.replace(GREEDY, repetition_penalty=1.4),
    dataclasses.replace(GREEDY, no_repeat_ngram_size=2, length_penalty=-1.0),
]
SAMPLED_CASES = [
    dataclasses.replace(SAMPLED, top_p=1.0),
    SAMPLED,
    dataclasses.replace(SAMPLED, temperature=0.6, top_k=5),
    dataclasses.replace(SAMPLED, top_p=0.7, repetition_penalty=1.3, min_new_tokens=5),
]


def generate_alone(pair: Pair, image: int, prompt: str, params: GenerationParams) -> tuple[Generation, ...]:
    (answers,) = pair.blip2.generate(pair.language_model_inputs[[image]], [prompt], params)
    return answers


def assert_scored_by_the_bare_model(
    pair: Pair, image: int, prompt: str, answer: Generation, params: GenerationParams
) -> None:
    expected = (
        pair.log_probability(image, prompt, answer.token_ids) / answer.num_tokens**params.length_penalty
    )
    assert answer.score == pytest.approx(expected, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("params", GREEDY_CASES, ids=label)
def test_greedy_search_equals_transformers(pair: Pair, params: GenerationParams) -> None:
    for image, prompt in enumerate(PROMPTS):
        (answer,) = generate_alone(pair, image, prompt, params)
        expected = pair.reference_generate(image, prompt, params)
        assert [answer.token_ids] == pair.new_tokens(expected, prompt)
        assert_scored_by_the_bare_model(pair, image, prompt, answer, params)


@pytest.mark.parametrize("params", SAMPLED_CASES, ids=label)
def test_sampling_draws_what_transformers_draws_from_the_same_seed(
    pair: Pair, params: GenerationParams
) -> None:
    assert params.seed is not None
    for image, prompt in enumerate(PROMPTS):
        (answer,) = generate_alone(pair, image, prompt, params)
        torch.manual_seed(params.seed)
        assert [answer.token_ids] == pair.new_tokens(pair.reference_generate(image, prompt, params), prompt)


def test_same_seed_gives_the_same_texts_and_another_seed_others(pair: Pair) -> None:
    params = dataclasses.replace(SAMPLED, num_return_sequences=4, top_p=1.0)
    first, again = (generate_alone(pair, 0, "a photo of", params) for _ in range(2))
    other = generate_alone(pair, 0, "a photo of", dataclasses.replace(params, seed=8))
    assert first == again
    assert first != other


def test_without_a_seed_every_run_draws_anew(pair: Pair) -> None:
    params = dataclasses.replace(SAMPLED, seed=None, num_return_sequences=8, top_p=1.0, min_new_tokens=8)
    assert generate_alone(pair, 0, "", params) != generate_alone(pair, 0, "", params)


def test_sampled_answers_of_one_request_differ_and_come_best_first(pair: Pair) -> None:
    params = dataclasses.replace(SAMPLED, num_return_sequences=8, top_p=1.0, min_new_tokens=5)
    answers = generate_alone(pair, 2, "a photo of", params)
    scores = [answer.score for answer in answers]
    assert len(answers) == 8
    assert len({answer.token_ids for answer in answers}) > 1
    assert scores == sorted(scores, reverse=True)
    for answer in answers:  # each grew on its own row of the cache
        assert_scored_by_the_bare_model(pair, 2, "a photo of", answer, params)


@torch.inference_mode()
def test_a_seeded_draw_does_not_depend_on_the_batch(pair: Pair) -> None:
    params = dataclasses.replace(SAMPLED, num_return_sequences=3)
    request = pair.request(0, "a photo of", params)
    decoder = Decoder(pair.language_model)
    decoder.add(pair.request(1, PROMPTS[2], dataclasses.replace(params, seed=1)))
    decoder.add(request)
    decoder.add(pair.request(2, "", GenerationParams(num_beams=4, max_new_tokens=15)))
    answers: dict[DecodeRequest, tuple[Generation, ...]] = {}
    while decoder.num_requests:
        answers.update(decoder.step())
    alone = generate_alone(pair, 0, "a photo of", params)
    assert [answer.token_ids for answer in answers[request]] == [answer.token_ids for answer in alone]


@pytest.mark.parametrize("do_sample", [False, True])
def test_an_answer_ends_where_the_rules_leave_no_token_and_no_other_changes(
    pair: Pair, do_sample: bool
) -> None:
    exhausting = GenerationParams(
        num_beams=1, max_new_tokens=80, min_new_tokens=80, no_repeat_ngram_size=1, do_sample=do_sample, seed=7
    )
    language_model = pair.blip2.language_model
    assert language_model is not None
    decoder = Decoder(language_model)
    requests = [
        DecodeRequest(pair.language_model_inputs[0], language_model.tokenize(PROMPTS[0]), params)
        for params in (exhausting, GREEDY)
    ]
    for request in requests:
        decoder.add(request)
    answers: dict[DecodeRequest, tuple[Generation, ...]] = {}
    with torch.inference_mode():
        while decoder.num_requests:
            answers.update(decoder.step())
    ((exhausted,), neighbour) = (answers[request] for request in requests)
    assert exhausted.finish_reason == "stop"
    assert len(set(exhausted.token_ids)) == exhausted.num_tokens < 80
    assert neighbour[0].token_ids == generate_alone(pair, 0, PROMPTS[0], GREEDY)[0].token_ids
