"""Searches with parameters drawn at random: the answers of `generate`, alone and together.

For each kind of language model, with weights whose answers end early, now and then, and never.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2ForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from model import Blip2, Decoder, DecodeRequest, Generation, GenerationParams
from model.checkpoints import save_hub
from model.components import Blip2Components
from model.generation import run_requests
from model.language import LanguageModel
from tests.builders import (
    MAX_POSITIONS,
    WORDS,
    build_components,
    build_language_model,
    build_language_tokenizer,
    random_pixels,
)
from tests.builders_t5 import build_t5_components
from tests.model.generation.reference import PROMPTS, Pair

NUM_CASES = 60  # for each of nine models
NUM_IMAGES = 4
NUM_SAMPLED = 12
ENDINGS = {"early": 3.0, "now and then": 0.5, "never": -100.0}  # added to the end tokens' logits
OTHER_END = 11  # a second token that ends the answers of those that end now and then


def build_llama_parts() -> Blip2Components:
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
    return dataclasses.replace(build_components(), language_model=language_model)


KINDS: dict[str, Callable[[], Blip2Components]] = {
    "opt": partial(build_components, eos_pull=0.0),
    "llama": build_llama_parts,
    "t5": partial(build_t5_components, "untied"),
}


def pull_towards_ends(head: nn.Module, token_ids: Sequence[int], pull: float) -> None:
    def shift(_module: nn.Module, _args: object, logits: Tensor) -> Tensor:
        shifts = torch.zeros(logits.shape[-1])
        shifts[list(token_ids)] = pull
        return logits + shifts

    head.register_forward_hook(shift)


@pytest.fixture(scope="module", params=[(kind, ending) for kind in KINDS for ending in ENDINGS], ids=" ".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    kind, ending = request.param
    blip2 = Blip2(KINDS[kind]()).eval()
    directory = tmp_path_factory.mktemp("reference")
    save_hub(directory, blip2.components)
    reference = Blip2ForConditionalGeneration.from_pretrained(directory).eval()
    language_model = blip2.require_language_model()
    if ending == "now and then":
        language_model.eos_token_ids = (*language_model.eos_token_ids, OTHER_END)
        reference.language_model.generation_config.eos_token_id = list(language_model.eos_token_ids)
    for llm in (language_model.llm, reference.language_model):
        pull_towards_ends(llm.get_output_embeddings(), language_model.eos_token_ids, ENDINGS[ending])
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


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Use two threads: one sums products in another order, and a score of -274 then differs by 1.2e-4."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@torch.inference_mode()
def run_staggered(
    pair: Pair, requests: Sequence[DecodeRequest], chance: random.Random
) -> dict[DecodeRequest, Sequence[Generation]]:
    """Run requests that join in the middle of others, in random order."""
    decoder, waiting = Decoder(pair.language_model), chance.sample(requests, len(requests))
    answers: dict[DecodeRequest, Sequence[Generation]] = {}
    while waiting or decoder.num_requests:
        for _ in range(min(chance.randint(0, 3), len(waiting))):
            decoder.add(waiting.pop())
        answers.update(decoder.step())
    return answers


@torch.inference_mode()
def test_answers_are_those_of_transformers_alone_together_and_staggered(pair: Pair) -> None:
    chance = random.Random(0)
    cases = [
        (chance.randrange(NUM_IMAGES), chance.choice(PROMPTS), random_params(chance))
        for _ in range(NUM_CASES)
    ]
    requests = [pair.request(*case) for case in cases]
    sampled = [pair.request(seed % NUM_IMAGES, "a photo of", sampling(seed)) for seed in range(NUM_SAMPLED)]
    together = run_requests(pair.language_model, requests)
    staggered = run_staggered(pair, [*requests, *sampled], chance)
    for request in sampled:
        (alone,) = run_requests(pair.language_model, [request])
        assert [answer.token_ids for answer in staggered[request]] == [answer.token_ids for answer in alone]
    num_tokens: set[int] = set()
    for case, request, answers in zip(cases, requests, together, strict=True):
        image, prompt, params = case
        expected = pair.reference_generate(image, prompt, params)
        token_ids = [answer.token_ids for answer in answers]
        assert token_ids == pair.new_tokens(expected, prompt), params
        (alone,) = run_requests(pair.language_model, [request])
        for same in (alone, staggered[request]):
            assert [answer.token_ids for answer in same] == token_ids, params
        if params.num_beams > 1:
            scores = torch.tensor([answer.score for answer in answers])
            torch.testing.assert_close(scores, expected.sequences_scores, rtol=2e-6, atol=1e-4)
        num_tokens |= {len(ids) for ids in token_ids}
    assert len(num_tokens) >= 5
