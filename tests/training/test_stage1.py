"""How stage 1 puts its losses together, seen through a matcher that records what it is asked."""

import pytest
import torch
from torch import Tensor

from tests.builders import build_matcher
from training.losses import itg_loss
from training.scene_text import listing_caption
from training.scenes import iter_scenes
from training.stage1 import contrast, matching_loss, stage1_losses, true_matches

SIZE = 4


class RecordingMatcher:
    """Images and texts are numbers, so that every pair it scores can be told apart."""

    def __init__(self) -> None:
        self.pairs: list[tuple[int, int]] = []

    def match_logits(self, image_features: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.pairs = list(zip(image_features[:, 0, 0].int().tolist(), input_ids[:, 0].tolist(), strict=True))
        return torch.zeros(len(image_features), 2)


@pytest.mark.parametrize("num_pairs", [None, 2])
def test_itm_takes_the_true_pairs_first_then_wrong_images_then_wrong_texts(num_pairs: int | None) -> None:
    images = torch.arange(SIZE).float().view(SIZE, 1, 1)
    texts, mask = torch.arange(SIZE).view(SIZE, 1), torch.ones(SIZE, 1)
    matches = torch.eye(SIZE, dtype=torch.bool)
    matches[0, 1] = True  # text 1 is true of image 0
    similarities = torch.full((SIZE, SIZE), -30.0)
    similarities[:, 3] = similarities[3] = 0.0  # the hardest negative of all is number 3, and for it any
    for seed in range(20):
        torch.manual_seed(seed)
        matcher = RecordingMatcher()
        matching_loss(matcher, images, texts, mask, similarities, matches, num_pairs)  # type: ignore[arg-type]
        size = num_pairs or SIZE
        true, wrong_image, wrong_text = (matcher.pairs[k * size : (k + 1) * size] for k in range(3))
        assert true == [(k, k) for k in range(size)]
        assert [text for _, text in wrong_image] == list(range(size))
        assert [image for image, _ in wrong_text] == list(range(size))
        assert not any(matches[image, text] for image, text in [*wrong_image, *wrong_text])
        assert [image for image, _ in wrong_image[:2]] == [text for _, text in wrong_text[:2]] == [3, 3]


def test_similarities_are_divided_by_the_temperature() -> None:
    matcher = build_matcher()
    states = matcher.encode_image_queries(torch.randn(2, 17, matcher.config.encoder_hidden_size))
    input_ids, mask = matcher.tokenize(["a red circle", "a blue star"])
    cosines = matcher.itc_scores(
        matcher.image_embeds(states.query_output), matcher.text_embeds(input_ids, mask)
    )
    similarities = contrast(matcher, states.query_output, input_ids, mask)
    torch.testing.assert_close(similarities, cosines / 0.07)


def test_itg_begins_with_dec_and_predicts_each_next_token_and_the_end() -> None:
    matcher = build_matcher()
    features = torch.randn(2, 17, matcher.config.encoder_hidden_size)
    input_ids, mask = matcher.tokenize(["a red", "a"])
    loss = stage1_losses(matcher, features, input_ids, mask, torch.eye(2, dtype=torch.bool))["loss_itg"]
    a, red = matcher.tokenizer.convert_tokens_to_ids(["a", "red"])
    dec, sep, pad = (
        matcher.tokenizer.bos_token_id,
        matcher.tokenizer.sep_token_id,
        matcher.tokenizer.pad_token_id,
    )
    keys_values = matcher.encode_image_queries(features).keys_values
    generated = torch.tensor([[dec, a, red, sep], [dec, a, sep, pad]])
    labels = torch.tensor([[a, red, sep, -100], [a, sep, -100, -100]])
    expected = itg_loss(matcher.generation_logits(generated, mask, keys_values), labels)
    torch.testing.assert_close(loss, expected)


def test_a_caption_matches_every_scene_it_is_true_of() -> None:
    scenes = list(iter_scenes(0, "train", 6))
    first = scenes[0].objects[0]
    captions = [f"a {first.color} {first.shape}", *[listing_caption(scene) for scene in scenes[1:]]]
    matches = true_matches([scenes[0], *scenes], [captions[0], *captions])
    assert matches[0, :2].all()
    assert matches[1, :2].all()
    assert matches[2:, 2:].diagonal().all()
