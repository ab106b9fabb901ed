"""The losses of stage 1, with a matcher that records the pairs it scores."""

import pytest
import torch
from torch import Tensor

from tests.builders import build_matcher
from training.data.batches import PairBatch
from training.losses import itc_loss, itg_loss
from training.stages.stage1 import stage1_losses

SIZE = 4
MATCHER = build_matcher()


class RecordingMatcher:
    """A matcher that records its pairs; images and texts are numbered, so that pairs can be identified."""

    def __init__(self) -> None:
        self.pairs: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(MATCHER, name)

    def itc_scores(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        similarities = torch.full((SIZE, SIZE), -30.0)
        similarities[:, 3] = similarities[3] = 0.0  # the hardest negative of all is number 3, and for it any
        return similarities * MATCHER.temperature

    def match_logits(self, image_features: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.pairs = list(zip(image_features[:, 0, 0].int().tolist(), input_ids[:, 1].tolist(), strict=True))
        return torch.zeros(len(image_features), 2)


def numbered_batch() -> PairBatch:
    features = torch.randn(SIZE, 17, MATCHER.config.encoder_hidden_size)
    features[:, 0, 0] = torch.arange(SIZE)
    input_ids, mask = MATCHER.tokenize(["a red"] * SIZE)
    input_ids[:, 1] = torch.arange(SIZE)
    matches = torch.eye(SIZE, dtype=torch.bool)
    matches[0, 1] = True  # text 1 is true of image 0
    return PairBatch(features, input_ids, mask, matches)


def batch_of(texts: list[str]) -> PairBatch:
    torch.manual_seed(0)
    features = torch.randn(len(texts), 17, MATCHER.config.encoder_hidden_size)
    return PairBatch(features, *MATCHER.tokenize(texts), torch.eye(len(texts), dtype=torch.bool))


@pytest.mark.parametrize("num_pairs", [SIZE, 2])
def test_itm_takes_the_true_pairs_first_then_wrong_images_then_wrong_texts(num_pairs: int) -> None:
    batch = numbered_batch()
    for seed in range(20):
        torch.manual_seed(seed)
        matcher = RecordingMatcher()
        stage1_losses(matcher, batch, num_pairs)  # type: ignore[arg-type]
        true, wrong_image, wrong_text = (matcher.pairs[k * num_pairs : (k + 1) * num_pairs] for k in range(3))
        assert true == [(k, k) for k in range(num_pairs)]
        assert [text for _, text in wrong_image] == list(range(num_pairs))
        assert [image for image, _ in wrong_text] == list(range(num_pairs))
        assert not any(batch.matches[image, text] for image, text in [*wrong_image, *wrong_text])
        assert [image for image, _ in wrong_image[:2]] == [text for _, text in wrong_text[:2]] == [3, 3]


def test_itc_covers_the_whole_batch_over_the_temperature() -> None:
    batch = batch_of(["a red circle", "a blue circle", "a green circle"])
    states = MATCHER.encode_image_queries(batch.image_features)
    cosines = MATCHER.itc_scores(
        MATCHER.image_embeds(states.query_output),
        MATCHER.text_embeds(batch.input_ids, batch.attention_mask),
    )
    losses = stage1_losses(MATCHER, batch, num_pairs=1)
    torch.testing.assert_close(losses["loss_itc"], itc_loss(cosines / 0.07, batch.matches))


@pytest.mark.parametrize("num_pairs", [1, 2])
def test_itg_begins_with_dec_and_predicts_each_next_token_and_the_end_of_the_first_pairs(
    num_pairs: int,
) -> None:
    batch = batch_of(["a red", "a"])
    loss = stage1_losses(MATCHER, batch, num_pairs)["loss_itg"]
    tokenizer = MATCHER.tokenizer
    a, red = tokenizer.convert_tokens_to_ids(["a", "red"])
    dec, sep, pad = tokenizer.bos_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
    keys_values = MATCHER.encode_image_queries(batch.image_features[:num_pairs]).keys_values
    generated = torch.tensor([[dec, a, red, sep], [dec, a, sep, pad]])[:num_pairs]
    labels = torch.tensor([[a, red, sep, -100], [a, sep, -100, -100]])[:num_pairs]
    logits = MATCHER.generation_logits(generated, batch.attention_mask[:num_pairs], keys_values)
    torch.testing.assert_close(loss, itg_loss(logits, labels))


def test_the_loss_is_the_sum_of_three_that_all_reach_the_queries() -> None:
    matcher = build_matcher()
    losses = stage1_losses(matcher, batch_of(["a red circle", "a blue circle", "a green circle"]), 3)
    terms = [losses[name] for name in ("loss_itc", "loss_itm", "loss_itg")]
    torch.testing.assert_close(losses["loss"], torch.stack(terms).sum())
    for term in terms:
        (gradient,) = torch.autograd.grad(term, matcher.query_tokens, retain_graph=True)
        assert gradient.abs().sum() > 0
