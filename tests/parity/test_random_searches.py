"""Searches with parameters drawn at random: the answers of `generate`, alone and in any company.

For each kind of language model, under weights with which answers end early, now and then, and never.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2ForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from model import Blip2, DecodeJob, Decoder, Generation, GenerationParams
from model.checkpoints import save_hub
from model.decoding import run_jobs
from model.language import LanguageModel
from model.parts import Blip2Parts
from tests.builders import (
    MAX_POSITIONS,
    WORDS,
    build_language_model,
    build_language_tokenizer,
    build_parts,
    random_pixels,
)
from tests.builders_t5 import build_t5_parts
from tests.model.decoding.reference import PROMPTS, Pair

NUM_CASES = 60  # for each of nine models
NUM_IMAGES = 4
NUM_SAMPLED = 12
PULLS = {"early": 3.0, "now and then": 0.5, "never": -100.0}  # added to the end tokens' logits
OTHER_END = 11  # a second token that ends the answers of those that end now and then


def build_llama_parts() -> Blip2Parts:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.25,
        eos_token_id=build_language_model().eos_token_ids[0],
    )
    language_model = LanguageModel(LlamaForCausalLM(config), build_language_tokenizer()).eval()
    return dataclasses.replace(build_parts(), language_model=language_model)


KINDS: dict[str, Callable[[], Blip2Parts]] = {
    "opt": partial(build_parts, eos_pull=0.0),
    "llama": build_llama_parts,
    "t5": partial(build_t5_parts, "untied"),
}


def pull_towards_ends(head: nn.Module, token_ids: Sequence[int], pull: float) -> None:
    def shift(_module: nn.Module, _args: object, logits: Tensor) -> Tensor:
        shifts = torch.zeros(logits.shape[-1])
        shifts[list(token_ids)] = pull
        return logits + shifts

    head.register_forward_hook(shift)


@pytest.fixture(scope="module", params=[(kind, temper) for kind in KINDS for temper in PULLS], ids=" ".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    kind, temper = request.param
    blip2 = Blip2(KINDS[kind]()).eval()
    directory = tmp_path_factory.mktemp("reference")
    save_hub(directory, blip2.parts)
    reference = Blip2ForConditionalGeneration.from_pretrained(directory).eval()
    language_model = blip2.require_language_model()
    if temper == "now and then":
        language_model.eos_token_ids = (*language_model.eos_token_ids, OTHER_END)
        reference.language_model.generation_config.eos_token_id = list(language_model.eos_token_ids)
    for llm in (language_model.llm, reference.language_model):
        pull_towards_ends(llm.get_output_embeddings(), language_model.eos_token_ids, PULLS[temper])
    pixel_values = random_pixels(NUM_IMAGES)
    with torch.inference_mode():
        inputs = blip2.project_queries(blip2.encode_queries(blip2.encode_images(pixel_values)))
    return Pair(blip2, reference, pixel_values, inputs)


def random_params(chance: random.Random) -> GenerationParams:
    num_beams = chance.choice([*range(1, 9), 12, 16])
    max_new_tokens = chance.randint(1, 14)
    return GenerationParams(
        num_beams=num_beams,
        num_return_sequences=chance.randint(1, num_beams),
        max_new_tokens=max_new_tokens,
        min_new_tokens=chance.choice([0, 1, chance.randint(0, max_new_tokens)]),
        length_penalty=chance.choice([-1.0, 0.0, 1.0, 2.0]),
        repetition_penalty=chance.choice([1.0, 1.0, 1.3, 0.8]),
        no_repeat_ngram_size=chance.choice([0, 0, 1, 2, 3]),
        early_stopping=chance.choice([False, True]),
    )


def sampling(seed: int) -> GenerationParams:
    return GenerationParams(
        num_beams=1,
        num_return_sequences=1 + seed % 5,
        max_new_tokens=4 + seed,
        do_sample=True,
        seed=seed,
        temperature=1.5,
        top_p=0.5 + 0.05 * (seed % 11),
        top_k=seed % 3 * 10,
        repetition_penalty=1 + seed % 2 / 5,
    )


@torch.inference_mode()
def run_in_turns(
    pair: Pair, jobs: Sequence[DecodeJob], chance: random.Random
) -> dict[DecodeJob, Sequence[Generation]]:
    """Has jobs join in the middle of others, in any order."""
    decoder, waiting = Decoder(pair.language_model), chance.sample(jobs, len(jobs))
    answers: dict[DecodeJob, Sequence[Generation]] = {}
    while waiting or decoder.num_jobs:
        for _ in range(min(chance.randint(0, 3), len(waiting))):
            decoder.add(waiting.pop())
        answers.update(decoder.step())
    return answers


@torch.inference_mode()
def test_answers_are_those_of_transformers_alone_together_and_in_turns(pair: Pair) -> None:
    chance = random.Random(0)
    cases = [
        (chance.randrange(NUM_IMAGES), chance.choice(PROMPTS), random_params(chance))
        for _ in range(NUM_CASES)
    ]
    jobs = [pair.job(*case) for case in cases]
    sampled = [pair.job(seed % NUM_IMAGES, "a photo of", sampling(seed)) for seed in range(NUM_SAMPLED)]
    together = run_jobs(pair.language_model, jobs)
    in_turns = run_in_turns(pair, [*jobs, *sampled], chance)
    for job in sampled:
        (alone,) = run_jobs(pair.language_model, [job])
        assert [answer.token_ids for answer in in_turns[job]] == [answer.token_ids for answer in alone]
    num_tokens: set[int] = set()
    for case, job, answers in zip(cases, jobs, together, strict=True):
        image, prompt, params = case
        expected = pair.reference_generate(image, prompt, params)
        token_ids = [answer.token_ids for answer in answers]
        assert token_ids == pair.new_tokens(expected, prompt), params
        (alone,) = run_jobs(pair.language_model, [job])
        for same in (alone, in_turns[job]):
            assert [answer.token_ids for answer in same] == token_ids, params
        if params.num_beams > 1:
            scores = torch.tensor([answer.score for answer in answers])
            # A score is a sum times its length: in float32, rounding leaves 1e-6 of several hundred.
            torch.testing.assert_close(scores, expected.sequences_scores, rtol=1e-6, atol=1e-4)
        num_tokens |= {len(ids) for ids in token_ids}
    assert len(num_tokens) >= 5
