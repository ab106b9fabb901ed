"""The stage-1 model: tokens, scores of any number of images and texts, and equality with the reference."""

import pytest
import torch
from torch import Tensor

from model.errors import TaskUnavailableError
from model.matching import Matcher
from model.vision import VisionEncoder
from tests.builders import (
    MAX_TEXT_TOKENS,
    NUM_QUERY_TOKENS,
    build_matcher,
    build_retrieval_reference,
    build_vision_model,
    random_pixels,
)

TEXTS = ("a red circle", "there is a small green square left of the blue star", "no")


@pytest.fixture(scope="module")
def vision_model() -> VisionEncoder:
    return build_vision_model()


@pytest.fixture(scope="module")
def matcher() -> Matcher:
    return build_matcher()


def features_of(vision_model: VisionEncoder, num_images: int) -> Tensor:
    with torch.no_grad():
        image_features: Tensor = vision_model(random_pixels(num_images))
    return image_features


def test_tokens_stand_between_cls_and_sep_and_are_padded_on_the_right(matcher: Matcher) -> None:
    input_ids, attention_mask = matcher.tokenize(["a red circle", "no"])
    tokens = [matcher.tokenizer.convert_ids_to_tokens(row) for row in input_ids.tolist()]
    assert tokens == [["[CLS]", "a", "red", "circle", "[SEP]"], ["[CLS]", "no", "[SEP]", "[PAD]", "[PAD]"]]
    assert attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


def test_a_text_too_long_keeps_its_sep_in_the_last_place(matcher: Matcher) -> None:
    input_ids, attention_mask = matcher.tokenize(["red " * 100])
    assert input_ids.shape == (1, MAX_TEXT_TOKENS)
    assert input_ids[0, -1] == matcher.tokenizer.sep_token_id
    assert (input_ids[0, 1:-1] == matcher.tokenizer.convert_tokens_to_ids("red")).all()
    assert attention_mask.all()


@torch.no_grad()
@pytest.mark.parametrize(("num_images", "text_count"), [(1, 1), (1, 3), (3, 1), (2, 3), (0, 2), (2, 0)])
def test_contrastive_scores_take_any_number_of_images_and_texts(
    matcher: Matcher, vision_model: VisionEncoder, num_images: int, text_count: int
) -> None:
    states = matcher.encode_image_queries(features_of(vision_model, 3)[:num_images])
    image_embeds = matcher.image_embeds(states.query_output)
    text_embeds = matcher.text_embeds(*matcher.tokenize(TEXTS[:text_count]))
    scores = matcher.itc_scores(image_embeds, text_embeds)
    assert image_embeds.shape == (num_images, NUM_QUERY_TOKENS, 16)
    assert scores.shape == (num_images, text_count)
    for image, text in torch.cartesian_prod(torch.arange(num_images), torch.arange(text_count)).tolist():
        cosines = torch.cosine_similarity(image_embeds[image], text_embeds[text], dim=-1)
        assert scores[image, text].item() == pytest.approx(cosines.max().item(), abs=1e-6)


@torch.no_grad()
def test_matching_logits_of_a_pair_do_not_depend_on_the_other_pairs(
    matcher: Matcher, vision_model: VisionEncoder
) -> None:
    features = features_of(vision_model, 2)
    input_ids, attention_mask = matcher.tokenize(TEXTS)
    images = [0, 0, 1, 1, 1]
    texts = [0, 1, 2, 0, 1]
    together = matcher.match_logits(features[images], input_ids[texts], attention_mask[texts])
    assert together.shape == (5, 2)
    for pair, (image, text) in enumerate(zip(images, texts, strict=True)):
        alone = matcher.match_logits(features[[image]], *matcher.tokenize([TEXTS[text]]))
        torch.testing.assert_close(together[[pair]], alone, rtol=0, atol=1e-4)


@torch.no_grad()
def test_half_precision_features_are_scored_in_float32(matcher: Matcher, vision_model: VisionEncoder) -> None:
    features = features_of(vision_model, 2).bfloat16()
    states = matcher.encode_image_queries(features)
    assert states.query_output.dtype == torch.float32
    assert matcher.match_logits(features, *matcher.tokenize(TEXTS[:2])).dtype == torch.float32


def test_text_head_shares_the_word_embeddings_even_after_moving(matcher: Matcher) -> None:
    moved = build_matcher().to(torch.float64)
    assert moved.text_head is not None
    assert moved.text_head.decoder.weight is moved.embeddings.word_embeddings.weight


def test_generation_logits_of_a_token_do_not_depend_on_later_ones(
    matcher: Matcher, vision_model: VisionEncoder
) -> None:
    keys_values = matcher.encode_image_queries(features_of(vision_model, 1)).keys_values
    input_ids, attention_mask = matcher.tokenize(["a red circle"])
    input_ids[:, 0] = matcher.tokenizer.bos_token_id
    before = matcher.generation_logits(input_ids, attention_mask, keys_values)
    input_ids[:, 3] += 1
    after = matcher.generation_logits(input_ids, attention_mask, keys_values)
    assert before.shape == (1, 5, matcher.config.vocab_size)
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=0)
    assert (before[:, 3:] != after[:, 3:]).any()


def test_generation_without_a_text_head_says_what_is_missing(
    vision_model: VisionEncoder, matcher: Matcher
) -> None:
    headless = build_matcher()
    headless.text_head = None
    keys_values = headless.encode_image_queries(features_of(vision_model, 1)).keys_values
    with pytest.raises(TaskUnavailableError, match="text_head"):
        headless.generation_logits(*headless.tokenize(["a"]), keys_values)


@torch.no_grad()
def test_itc_and_itm_equal_transformers(matcher: Matcher, vision_model: VisionEncoder) -> None:
    reference = build_retrieval_reference(matcher, vision_model)
    pixel_values = random_pixels(3)
    input_ids, attention_mask = matcher.tokenize(TEXTS)
    itc = reference(pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask)
    itm = reference(
        pixel_values=pixel_values,
        input_ids=input_ids,
        attention_mask=attention_mask,
        use_image_text_matching_head=True,
    )
    features = vision_model(pixel_values)
    image_embeds = matcher.image_embeds(matcher.encode_image_queries(features).query_output)
    scores = matcher.itc_scores(image_embeds, matcher.text_embeds(input_ids, attention_mask))
    torch.testing.assert_close(scores, itc.logits_per_image, rtol=0, atol=1e-5)
    logits = matcher.match_logits(features, input_ids, attention_mask)
    torch.testing.assert_close(logits, itm.logits_per_image, rtol=0, atol=1e-4)
