"""Models saved by `transformers` have equal answers here and there, in several sizes.

Weights are random but not small, so that answers differ from image to image and end tokens do occur.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
    PreTrainedModel,
    T5Config,
)

from model import Blip2, DecodeRequest, GenerationParams
from model.generation import run_requests
from tests.builders import WORDS, build_language_tokenizer, build_text_tokenizer
from tests.builders_t5 import PROMPT_WORDS, build_t5_tokenizer

NUM_IMAGES = 5
PROMPTS = (
    *("", "a", "a photo of", "a red circle and", "there is", "two blue"),
    "question : what is left of the star ? answer :",
    "question : is there a red cross ? answer :",
    "question : how many small circle ? answer : one question : what color is the square ? answer :",
    "the big green star and the small red square above the cross and",
)
SEARCHES = (GenerationParams(num_beams=1, max_new_tokens=12), GenerationParams(max_new_tokens=12))


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes of one checkpoint; cross_every: see `cross_attention_frequency`."""

    num_query_tokens: int
    vision_size: int
    vision_layers: int
    qformer_layers: int
    cross_every: int
    language_size: int
    language_layers: int
    image_size: int


SIZES = (
    Size(4, 32, 1, 2, 2, 32, 1, 16),
    Size(8, 48, 2, 4, 2, 32, 2, 32),
    Size(16, 32, 3, 3, 1, 64, 2, 24),
    Size(32, 64, 2, 2, 2, 48, 3, 32),
)


def build_config(size: Size, text_config: OPTConfig | T5Config | None) -> Blip2Config:
    vision = Blip2VisionConfig(
        hidden_size=size.vision_size,
        intermediate_size=2 * size.vision_size,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=2,
        image_size=size.image_size,
        patch_size=8,
    )
    qformer = Blip2QFormerConfig(
        hidden_size=32,
        num_hidden_layers=size.qformer_layers,
        num_attention_heads=4,
        intermediate_size=64,
        encoder_hidden_size=size.vision_size,
        cross_attention_frequency=size.cross_every,
        vocab_size=len(WORDS) + 5,
        max_position_embeddings=40,
        use_qformer_text_input=text_config is None,
    )
    return Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=None if text_config is None else text_config.to_dict(),
        num_query_tokens=size.num_query_tokens,
        image_text_hidden_size=16,
        image_token_index=None if text_config is None else (3 if text_config.is_encoder_decoder else 4),
    )


def randomize(model: PreTrainedModel, *, seed: int) -> None:
    """Randomise all weights, also the queries, which transformers initialises to zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=_spread(name), generator=generator)
            if "norm" in name.lower() and name.endswith("weight"):
                weight.add_(1)


def _spread(name: str) -> float:
    if "query_tokens" in name or "embed_positions" in name:
        return 1.0
    return 0.5 if "embed" in name or "shared" in name else 0.3


def opt_config(size: Size) -> OPTConfig:
    return OPTConfig(
        vocab_size=len(WORDS) + 8,
        hidden_size=size.language_size,
        word_embed_proj_dim=size.language_size,
        num_hidden_layers=size.language_layers,
        num_attention_heads=2,
        ffn_dim=64,
        max_position_embeddings=128,
        eos_token_id=3,
    )


def t5_config(size: Size) -> T5Config:
    return T5Config(
        vocab_size=len(PROMPT_WORDS) + len(WORDS) + 8,
        d_model=size.language_size,
        d_kv=16,
        d_ff=64,
        num_layers=size.language_layers,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=32,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
        feed_forward_proj="gated-gelu",
        dense_act_fn="gelu",
    )


def save_generation(
    directory: Path, size: Size, language_family: str, *, seed: int
) -> Blip2ForConditionalGeneration:
    """Save a checkpoint by transformers, and return the reference loaded from it."""
    text_config = opt_config(size) if language_family == "opt" else t5_config(size)
    tokenizer = build_language_tokenizer() if language_family == "opt" else build_t5_tokenizer()
    model = Blip2ForConditionalGeneration(build_config(size, text_config))
    randomize(model, seed=seed)
    llm = model.language_model
    end = llm.config.eos_token_id
    with torch.no_grad():
        if language_family == "opt":
            direction = llm.get_input_embeddings().weight[end]
            llm.model.decoder.final_layer_norm.bias.add_(direction / direction.norm(), alpha=2.5)
        else:
            llm.lm_head.weight.normal_(std=0.15, generator=torch.Generator().manual_seed(seed))
            llm.lm_head.weight[end] *= 4
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Blip2ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()


def random_pixels(count: int, size: Size) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, size.image_size, size.image_size, generator=generator)


def reference_answer(
    reference: Blip2ForConditionalGeneration, pixels: Tensor, input_ids: list[int], params: GenerationParams
) -> list[int]:
    """Return the tokens that `generate` returns for one image and prompt alone, up to the end token."""
    ids = torch.tensor([input_ids])
    sequence: list[int] = reference.generate(
        pixel_values=pixels[None],
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        num_beams=params.num_beams,
        max_new_tokens=params.max_new_tokens,
        min_new_tokens=params.min_new_tokens,
        do_sample=False,
    )[0].tolist()
    llm = reference.language_model.config
    answer = sequence[1 if llm.is_encoder_decoder else len(input_ids) :]
    return answer[: answer.index(llm.eos_token_id) + 1] if llm.eos_token_id in answer else answer


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("language_family", ["opt", "t5"])
@torch.inference_mode()
def test_fifty_images_and_prompts_of_unequal_length_are_answered_together_as_each_alone(
    language_family: str, size: Size, tmp_path: Path
) -> None:
    reference = save_generation(tmp_path, size, language_family, seed=SIZES.index(size))
    blip2 = Blip2.from_pretrained(str(tmp_path))
    language_model = blip2.language_model
    assert language_model is not None
    pixels = random_pixels(NUM_IMAGES, size)
    inputs = blip2.project_queries(blip2.encode_queries(blip2.encode_images(pixels)))
    expected_inputs = reference.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    torch.testing.assert_close(inputs, expected_inputs, rtol=1e-5, atol=1e-5)

    cases = [
        (image, prompt, params) for params in SEARCHES for image in range(NUM_IMAGES) for prompt in PROMPTS
    ]
    requests = [
        DecodeRequest(inputs[image], language_model.tokenize(prompt), params)
        for image, prompt, params in cases
    ]
    answers = [list(best[0].token_ids) for best in run_requests(language_model, requests)]
    image_tokens = [language_model.image_token_id] * size.num_query_tokens
    expected = [
        reference_answer(reference, pixels[image], [*image_tokens, *language_model.tokenize(prompt)], params)
        for image, prompt, params in cases
    ]
    assert answers == expected
    assert len({tuple(answer) for answer in answers}) >= 20
    assert sum(answer[-1] in language_model.eos_token_ids for answer in answers) >= 10

    ids = torch.tensor([[*image_tokens, *language_model.tokenize(PROMPTS[-1])]])
    start = torch.tensor([[0]]) if language_model.llm.config.is_encoder_decoder else None
    options = {} if start is None else {"decoder_input_ids": start}
    logits = reference(
        pixel_values=pixels[:1], input_ids=ids, attention_mask=torch.ones_like(ids), **options
    ).logits[0, -1]
    ours, _ = language_model.prefill([inputs[0]], [language_model.tokenize(PROMPTS[-1])])
    torch.testing.assert_close(ours[0], logits.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.inference_mode()
def test_similarity_and_matching_are_those_of_transformers(size: Size, tmp_path: Path) -> None:
    model = Blip2ForImageTextRetrieval(build_config(size, None))
    randomize(model, seed=SIZES.index(size))
    model.save_pretrained(tmp_path)
    build_text_tokenizer().save_pretrained(tmp_path)
    reference = Blip2ForImageTextRetrieval.from_pretrained(tmp_path, dtype=torch.float32).eval()
    blip2 = Blip2.from_pretrained(str(tmp_path))
    matcher = blip2.matcher
    assert matcher is not None
    pixels = random_pixels(len(PROMPTS), size)
    input_ids, attention_mask = matcher.tokenize(PROMPTS)
    options = {"pixel_values": pixels, "input_ids": input_ids, "attention_mask": attention_mask}
    itc = reference(**options, use_image_text_matching_head=False).logits_per_image
    itm = reference(**options, use_image_text_matching_head=True).logits_per_image.softmax(dim=1)
    features = blip2.encode_images(pixels)
    image_embeds = matcher.image_embeds(matcher.encode_image_queries(features).query_output)
    ours = matcher.itc_scores(image_embeds, matcher.text_embeds(input_ids, attention_mask))
    torch.testing.assert_close(ours, itc, rtol=0, atol=1e-5)
    ours = matcher.match_logits(features, input_ids, attention_mask).softmax(dim=1)
    torch.testing.assert_close(ours, itm, rtol=0, atol=1e-5)
    assert itm[:, 1].std() > 0.01
