"""The whole model: equality with the reference, retrieval-only checkpoints, dtypes."""

from pathlib import Path

import pytest
import torch
from transformers import Blip2ForConditionalGeneration

from model import (
    Blip2,
    EmbeddingKind,
    GenerationParams,
    InvalidPromptError,
    NonFiniteError,
    TaskUnavailableError,
)
from model.checkpoints import LoadOptions
from tests.builders import IMAGE_SIZE, NUM_QUERY_TOKENS, build_components, random_pixels

PARAMS = GenerationParams(num_beams=2, max_new_tokens=6)


@torch.inference_mode()
def test_every_stage_of_the_image_path_equals_transformers(
    blip2: Blip2, reference: Blip2ForConditionalGeneration
) -> None:
    pixel_values = random_pixels(3)
    outputs = reference.get_image_features(pixel_values)
    image_features = blip2.encode_images(pixel_values)
    query_output = blip2.encode_queries(image_features)
    language_model_inputs = blip2.project_queries(query_output)
    normed = blip2.ln_vision(image_features)
    torch.testing.assert_close(normed, outputs.last_hidden_state, rtol=0, atol=1e-5)
    torch.testing.assert_close(query_output, outputs.qformer_outputs.last_hidden_state, rtol=0, atol=1e-5)
    torch.testing.assert_close(language_model_inputs, outputs.pooler_output, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_logits_behind_image_and_prompt_equal_transformers(
    blip2: Blip2, reference: Blip2ForConditionalGeneration
) -> None:
    assert blip2.language_model is not None
    pixel_values = random_pixels(1)
    prompt_ids = blip2.language_model.tokenize("question : what is it ? answer :")
    input_ids = torch.tensor([[blip2.language_model.image_token_id] * NUM_QUERY_TOKENS + list(prompt_ids)])
    expected = reference(pixel_values=pixel_values, input_ids=input_ids).logits[:, -1]
    soft_tokens = blip2.project_queries(blip2.encode_queries(blip2.encode_images(pixel_values)))
    logits, _ = blip2.language_model.prefill(list(soft_tokens), [prompt_ids])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_answers_keep_the_order_of_the_images_whichever_ends_first(blip2: Blip2) -> None:
    soft_tokens = torch.randn(4, NUM_QUERY_TOKENS, 32, generator=torch.Generator().manual_seed(0))
    prompts = ["", "a photo of a red circle", "a", "what is it ?"]
    together = blip2.generate(soft_tokens, prompts, PARAMS)
    alone = [blip2.generate(soft_tokens[[i]], [prompts[i]], PARAMS)[0] for i in range(4)]
    assert [answers[0].token_ids for answers in together] == [answers[0].token_ids for answers in alone]


def test_a_prompt_that_leaves_no_room_for_the_answer_is_refused(blip2: Blip2) -> None:
    soft_tokens = torch.zeros(1, NUM_QUERY_TOKENS, 32)
    with pytest.raises(InvalidPromptError, match="shorten the prompt or lower max_new_tokens"):
        blip2.generate(soft_tokens, ["red " * 80], GenerationParams(max_new_tokens=30))


def test_a_score_that_is_not_finite_is_an_error(blip2: Blip2) -> None:
    soft_tokens = torch.zeros(2, NUM_QUERY_TOKENS, 32)
    soft_tokens[1] = torch.nan
    with pytest.raises(NonFiniteError, match="image 1: the model gave a score that is not finite"):
        blip2.generate(soft_tokens, ["", ""], PARAMS)


def test_unequal_numbers_of_images_and_prompts_are_a_bug_of_the_caller(blip2: Blip2) -> None:
    with pytest.raises(ValueError, match="zip"):
        blip2.generate(torch.zeros(2, NUM_QUERY_TOKENS, 32), [""], PARAMS)


@torch.inference_mode()
def test_a_retrieval_checkpoint_compares_but_does_not_speak(random_checkpoint: Path) -> None:
    blip2 = Blip2.from_pretrained(str(random_checkpoint.parent / "stage1"))
    assert blip2.matcher is not None
    assert blip2.language_model is None
    query_output = blip2.encode_queries(blip2.encode_images(random_pixels(2)))
    scores = blip2.matcher.itc_scores(
        blip2.matcher.image_embeds(query_output), blip2.matcher.text_embeds(*blip2.matcher.tokenize(["a"]))
    )
    assert scores.shape == (2, 1)
    with pytest.raises(TaskUnavailableError, match="no language model"):
        blip2.project_queries(query_output)
    with pytest.raises(TaskUnavailableError, match="no language model"):
        blip2.generate(torch.zeros(1, NUM_QUERY_TOKENS, 32), [""], PARAMS)


def test_the_matcher_sees_through_the_same_encoder_as_the_rest(blip2: Blip2) -> None:
    assert blip2.matcher is not None
    names = [name for name, _ in blip2.named_modules() if name.endswith("vit")]
    assert names == ["vision_model.vit"]


@torch.inference_mode()
def test_half_precision_holds_for_the_frozen_models_only(random_checkpoint: Path) -> None:
    blip2 = Blip2.from_pretrained(str(random_checkpoint), LoadOptions(dtype=torch.bfloat16))
    assert blip2.language_model is not None
    image_features = blip2.encode_images(random_pixels(1))
    query_output = blip2.encode_queries(image_features)
    soft_tokens = blip2.project_queries(query_output)
    assert (blip2.dtype, blip2.language_model.dtype) == (torch.bfloat16, torch.bfloat16)
    assert image_features.dtype == torch.bfloat16
    assert (query_output.dtype, soft_tokens.dtype) == (torch.float32, torch.float32)
    ((answer,),) = blip2.generate(soft_tokens, ["a photo of"], PARAMS)
    assert answer.num_tokens >= 1


def test_frozen_models_are_frozen_and_the_rest_can_be_trained(blip2: Blip2) -> None:
    assert blip2.language_model is not None
    frozen = [*blip2.vision_model.parameters(), *blip2.language_model.parameters()]
    assert not any(value.requires_grad for value in frozen)
    assert all(value.requires_grad for value in blip2.qformer.parameters())
    assert blip2.query_tokens.requires_grad
    assert not blip2.training


def test_components_of_a_model_are_those_it_was_built_from() -> None:
    components = build_components()
    assert Blip2(components).components == components
    assert Blip2(components).image_size == IMAGE_SIZE


@torch.inference_mode()
def test_each_kind_of_embedding_is_computed_from_image_features(blip2: Blip2) -> None:
    image_features = blip2.encode_images(random_pixels(2))
    matcher = blip2.require_matcher()
    image_embeds = matcher.image_embeds(matcher.encode_image_queries(image_features).query_output)
    query_output = blip2.encode(EmbeddingKind.QUERY_OUTPUT, image_features)
    assert torch.equal(query_output, blip2.encode_queries(image_features))
    assert torch.equal(blip2.encode(EmbeddingKind.IMAGE_EMBEDS, image_features), image_embeds)
    assert torch.equal(blip2.encode(EmbeddingKind.IMAGE_FEATURES, image_features), image_features)
    assert torch.equal(blip2.project(query_output[0]), blip2.project_queries(query_output[:1])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_an_empty_embedding_has_the_shape_and_dtype_of_computed_ones(
    random_checkpoint: Path, dtype: torch.dtype
) -> None:
    blip2 = Blip2.from_pretrained(str(random_checkpoint), LoadOptions(dtype=dtype))
    image_features = blip2.encode_images(random_pixels(1))
    for kind in EmbeddingKind:
        computed, empty = blip2.encode(kind, image_features)[0], blip2.empty_embedding(kind)
        assert (empty.shape, empty.dtype) == (computed.shape, computed.dtype)


def test_embeddings_of_an_absent_matcher_are_refused() -> None:
    blip2 = Blip2(build_components(), name="no-matcher")
    with pytest.raises(TaskUnavailableError, match="'no-matcher' has no ITC and ITM heads"):
        blip2.encode(EmbeddingKind.IMAGE_EMBEDS, torch.zeros(1, 17, 48))
