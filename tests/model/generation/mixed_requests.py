"""Requests of all kinds for one decoder, and the generations of each alone."""

import pytest
import torch

from model import Decoder, DecodeRequest, Generation, GenerationParams
from model.language import LanguageModel

PARAMS = (
    GenerationParams(num_beams=5, num_return_sequences=5, max_new_tokens=12),
    GenerationParams(num_beams=3, num_return_sequences=2, max_new_tokens=7, length_penalty=-1.0),
    GenerationParams(num_beams=1, max_new_tokens=10),
    GenerationParams(num_beams=1, max_new_tokens=9, do_sample=True, num_return_sequences=3, seed=3),
    GenerationParams(num_beams=4, max_new_tokens=14, repetition_penalty=1.3, no_repeat_ngram_size=2),
    GenerationParams(num_beams=2, max_new_tokens=1, early_stopping=True),
)
Answers = dict[DecodeRequest, tuple[Generation, ...]]


@torch.inference_mode()
def run_alone(language_model: LanguageModel, request: DecodeRequest) -> tuple[Generation, ...]:
    decoder = Decoder(language_model)
    decoder.add(request)
    answers: Answers = {}
    while decoder.num_requests:
        answers.update(decoder.step())
    return answers[request]


def assert_same_answers(together: tuple[Generation, ...], alone: tuple[Generation, ...]) -> None:
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    expected = [answer.score for answer in alone]
    assert [answer.score for answer in together] == pytest.approx(expected, rel=1e-5, abs=1e-5)
