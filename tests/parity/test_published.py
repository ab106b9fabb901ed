"""Checkpoints written as the public ones are have equal ids, logits, beams and scores here and there."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    PreTrainedModel,
)

from model import Blip2, DecodeRequest, GenerationParams
from model.generation import run_requests
from tests.builders import random_picture
from tests.parity.published import write_published, write_retrieval

pytestmark = [pytest.mark.public, pytest.mark.slow]

QUESTION = "Question: how many cats are there? Answer:"
PROMPTS = (QUESTION, "a photo of", "Question: what is this? Answer: a dog. Question: why? Answer:")
PICTURES = [random_picture(seed, width=300, height=200) for seed in range(2)]
PARAMS = (GenerationParams(num_beams=5, max_new_tokens=10), GenerationParams(num_beams=1, max_new_tokens=10))
PUBLISHED = {
    "blip2-opt-2.7b": ([2, 45641, 35, 141, 171, 10017, 32, 89, 116, 31652, 35], 50118, 50265, 1e-6),
    "blip2-flan-t5-xl": ([11860, 10, 149, 186, 10003, 33, 132, 58, 11801, 10, 1], 1, 32100, 1e-5),
}


def generate(
    reference: PreTrainedModel, inputs: dict[str, torch.Tensor], params: GenerationParams
) -> list[int]:
    """Return the tokens that `generate` of transformers answers with, up to the end token."""
    sequence: list[int] = reference.generate(
        **inputs,
        num_beams=params.num_beams,
        max_new_tokens=params.max_new_tokens,
        min_new_tokens=params.min_new_tokens,
    )[0].tolist()
    config = reference.config.text_config
    answer = sequence[1 if config.is_encoder_decoder else inputs["input_ids"].shape[1] :]
    return answer[: answer.index(config.eos_token_id) + 1] if config.eos_token_id in answer else answer


@pytest.mark.parametrize("name", PUBLISHED)
@torch.inference_mode()
def test_a_generation_checkpoint_answers_as_in_transformers(
    name: str, public_directory: Path, tmp_path: Path
) -> None:
    write_published(public_directory / name, tmp_path / name, Blip2ForConditionalGeneration)
    question_ids, end, image_token_id, layer_norm_eps = PUBLISHED[name]
    blip2 = Blip2.from_pretrained(str(tmp_path / name))
    language_model = blip2.require_language_model()
    assert language_model.tokenize(QUESTION) == tuple(question_ids)
    assert (language_model.eos_token_ids, language_model.image_token_id) == ((end,), image_token_id)
    assert (blip2.image_size, blip2.vision_model.layer_norm_eps) == (224, layer_norm_eps)

    reference = Blip2ForConditionalGeneration.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
    reference.config.image_token_index = image_token_id  # which the T5's published configuration leaves out
    processor = Blip2Processor.from_pretrained(tmp_path / name)
    cases = [(image, prompt) for image in range(len(PICTURES)) for prompt in PROMPTS]
    asked = [processor(images=PICTURES[image], text=prompt, return_tensors="pt") for image, prompt in cases]
    assert asked[0].input_ids[0].tolist() == [image_token_id] * 32 + question_ids
    pixels = torch.stack([blip2.preprocess(picture) for picture in PICTURES])
    assert torch.equal(pixels[0], asked[0].pixel_values[0])

    inputs = blip2.project_queries(blip2.encode_queries(blip2.encode_images(pixels)))
    expected = reference.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    torch.testing.assert_close(inputs, expected, rtol=1e-4, atol=1e-4)
    assert (inputs[0] - inputs[1]).abs().max() > 0.1
    _compare_logits(blip2, reference, inputs, asked, cases)
    for params in PARAMS:
        requests = [
            DecodeRequest(inputs[image], language_model.tokenize(prompt), params) for image, prompt in cases
        ]
        answers = [list(best[0].token_ids) for best in run_requests(language_model, requests)]
        assert answers == [generate(reference, each, params) for each in asked]
        assert len({tuple(answer) for answer in answers}) > 3


def _compare_logits(
    blip2: Blip2,
    reference: PreTrainedModel,
    inputs: torch.Tensor,
    asked: Sequence[dict[str, torch.Tensor]],
    cases: Sequence[tuple[int, str]],
) -> None:
    language_model = blip2.require_language_model()
    prompts = [language_model.tokenize(prompt) for _, prompt in cases]
    logits, _ = language_model.prefill([inputs[image] for image, _ in cases], prompts)
    is_encoder_decoder = reference.config.text_config.is_encoder_decoder
    start = {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)} if is_encoder_decoder else {}
    expected = torch.stack([reference(**each, **start).logits[0, -1] for each in asked])
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert expected.std(dim=0).mean() > 0.01


@torch.inference_mode()
def test_a_retrieval_checkpoint_scores_as_in_transformers(public_directory: Path, tmp_path: Path) -> None:
    keys = json.loads((public_directory / "itm_keys_derived.json").read_text())
    source, directory = public_directory / "blip2-opt-2.7b", tmp_path / "itm"
    write_retrieval(source, keys, directory, Blip2ForImageTextRetrieval)
    reference = Blip2ForImageTextRetrieval.from_pretrained(directory, dtype=torch.float32).eval()
    processor = Blip2Processor.from_pretrained(directory)
    blip2 = Blip2.from_pretrained(str(directory))
    matcher = blip2.require_matcher()
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == len(
        matcher.embeddings.word_embeddings.weight
    )
    texts = ["two cats on a pink blanket", "a dog."]
    inputs = processor(images=PICTURES, text=texts, padding=True, return_tensors="pt")
    features = blip2.encode_images(torch.stack([blip2.preprocess(picture) for picture in PICTURES]))
    itm = reference(**inputs, use_image_text_matching_head=True).logits_per_image
    torch.testing.assert_close(
        matcher.match_logits(features, *matcher.tokenize(texts)), itm, rtol=1e-4, atol=1e-4
    )
    itc = reference(**inputs, use_image_text_matching_head=False).logits_per_image
    ours = matcher.itc_scores(matcher.embed_images(features), matcher.embed_texts(texts))
    torch.testing.assert_close(ours, itc, rtol=1e-4, atol=1e-4)
    assert itm.std() > 0.01
    special = matcher.embed_texts(["<image> a dog.", "[SEP] a dog."])
    assert torch.isfinite(special).all()
