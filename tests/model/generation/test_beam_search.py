"""Beam search: the tokens and scores of transformers' `generate`, whatever the parameters."""

import itertools

import pytest
import torch

from model import Generation, GenerationParams
from tests.model.generation.reference import PROMPTS, Pair, label

SHAPES = [
    GenerationParams(
        num_beams=num_beams,
        num_return_sequences=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        max_new_tokens=15,
    )
    for num_beams, length_penalty, early_stopping in itertools.product(
        (2, 3, 4, 5, 6, 7, 8), (-1.0, 0.0, 1.0, 2.0), (False, True)
    )
]
RULES = [
    GenerationParams(num_beams=5, num_return_sequences=2, max_new_tokens=1),
    GenerationParams(num_beams=5, num_return_sequences=5, max_new_tokens=2, min_new_tokens=2),
    GenerationParams(num_beams=4, num_return_sequences=3, max_new_tokens=9, min_new_tokens=0),
    GenerationParams(num_beams=3, num_return_sequences=3, max_new_tokens=12, min_new_tokens=12),
    GenerationParams(num_beams=3, num_return_sequences=1, max_new_tokens=20, min_new_tokens=6),
    GenerationParams(num_beams=16, num_return_sequences=16, max_new_tokens=8),
    GenerationParams(num_beams=5, max_new_tokens=20, repetition_penalty=1.5),
    GenerationParams(num_beams=5, max_new_tokens=20, repetition_penalty=0.7, length_penalty=-1.0),
    GenerationParams(num_beams=5, max_new_tokens=20, no_repeat_ngram_size=1),
    GenerationParams(num_beams=5, max_new_tokens=20, no_repeat_ngram_size=2, min_new_tokens=10),
    GenerationParams(num_beams=2, max_new_tokens=20, no_repeat_ngram_size=3, repetition_penalty=1.2),
    GenerationParams(
        num_beams=5,
        num_return_sequences=4,
        max_new_tokens=20,
        min_new_tokens=5,
        no_repeat_ngram_size=2,
        repetition_penalty=1.15,
        length_penalty=0.0,
        early_stopping=True,
    ),
]


def generate_alone(pair: Pair, image: int, prompt: str, params: GenerationParams) -> tuple[Generation, ...]:
    (answers,) = pair.blip2.generate(pair.language_model_inputs[[image]], [prompt], params)
    return answers


def assert_equals_reference(pair: Pair, image: int, prompt: str, params: GenerationParams) -> None:
    answers = generate_alone(pair, image, prompt, params)
    expected = pair.reference_generate(image, prompt, params)
    assert [answer.token_ids for answer in answers] == pair.new_tokens(expected, prompt)
    scores = torch.tensor([answer.score for answer in answers])
    torch.testing.assert_close(scores, expected.sequences_scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("params", SHAPES, ids=label)
def test_every_beam_width_and_length_penalty_equals_transformers(
    pair: Pair, params: GenerationParams
) -> None:
    for image, prompt in enumerate(PROMPTS):
        assert_equals_reference(pair, image, prompt, params)


@pytest.mark.parametrize("params", RULES, ids=label)
def test_every_rule_about_tokens_equals_transformers(pair: Pair, params: GenerationParams) -> None:
    for image, prompt in enumerate(PROMPTS):
        assert_equals_reference(pair, image, prompt, params)


def test_the_compared_answers_end_early_and_at_different_lengths(pair: Pair) -> None:
    params = GenerationParams(num_beams=6, num_return_sequences=6, max_new_tokens=15)
    answers = [answer for image in range(3) for answer in generate_alone(pair, image, PROMPTS[image], params)]
    assert len({answer.num_tokens for answer in answers}) >= 3
    assert any(answer.finish_reason == "stop" for answer in answers)


def test_an_answer_says_how_long_it_is_and_why_it_ended(pair: Pair) -> None:
    params = GenerationParams(num_beams=3, num_return_sequences=3, max_new_tokens=5)
    for answer in generate_alone(pair, 0, "a photo of", params):
        is_ended = answer.token_ids[-1] in pair.language_model.eos_token_ids
        assert answer.finish_reason == ("stop" if is_ended else "length")
        assert answer.num_tokens == len(answer.token_ids)
        assert answer.text == pair.language_model.decode_tokens(answer.token_ids)


def test_answers_come_best_first(pair: Pair) -> None:
    params = GenerationParams(num_beams=6, num_return_sequences=6, max_new_tokens=10)
    scores = [answer.score for answer in generate_alone(pair, 1, "a photo of", params)]
    assert scores == sorted(scores, reverse=True)
