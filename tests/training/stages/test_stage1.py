"""The losses of stage 1, with a matcher that records the pairs it scores."""

import pytest
import torch
from torch import Tensor

from model.qformer import ImageKeysValues
from tests.builders import build_matcher
from tests.training.stages.lavis_losses import (
    contrastive_loss,
    generation_loss,
    joint_states,
    matching_loss,
)
from training.data.batches import PairBatch
from training.diagnostics import query_cosine
from training.losses import itc_loss, itg_loss, sample_hard_negatives
from training.stages.stage1 import stage1_losses

SIZE = 4
MATCHER = build_matcher()


class RecordingMatcher:
    """A matcher that records its pairs: images found by their keys, texts by their first token."""

    def __init__(self) -> None:
        self.pairs: list[tuple[int, int]] = []
        self.keys_values: ImageKeysValues = []

    def __getattr__(self, name: str) -> object:
        return getattr(MATCHER, name)

    def itc_scores(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        similarities = torch.full((SIZE, SIZE), -30.0)
        similarities[:, 3] = similarities[3] = 0.0  # the hardest negative of all is number 3, and for it any
        return similarities * MATCHER.temperature

    def project_images(self, image_features: Tensor) -> ImageKeysValues:
        self.keys_values = MATCHER.project_images(image_features)
        return self.keys_values

    def match_logits(self, image: ImageKeysValues, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        (known, _), (chosen, _) = self.keys_values[0], image[0]  # type: ignore[misc]
        images = [next(i for i in range(SIZE) if torch.equal(known[i], keys)) for keys in chosen]
        self.pairs = list(zip(images, input_ids[:, 1].tolist(), strict=True))
        return torch.zeros(len(images), 2)


def numbered_batch() -> PairBatch:
    features = torch.randn(SIZE, 17, MATCHER.config.encoder_hidden_size)
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


def test_the_losses_and_gradients_are_those_of_four_separate_passes_as_in_lavis() -> None:
    """Nothing changes by sharing the query pass and the keys and values, and leaving padding out."""
    matcher = build_matcher()
    batch = batch_of(["a red circle", "a blue star above a circle", "a", "two stars"])
    torch.manual_seed(5)
    losses = stage1_losses(matcher, batch, num_pairs=4)
    torch.manual_seed(5)
    with torch.no_grad():
        images = matcher.embed_images(batch.image_features)
        cosines = matcher.itc_scores(images, matcher.text_embeds(batch.input_ids, batch.attention_mask))
        negative_text, negative_image = sample_hard_negatives(cosines / matcher.temperature, batch.matches)
    expected = {
        "loss_itc": contrastive_loss(matcher, batch),
        "loss_itm": matching_loss(matcher, batch, negative_text, negative_image),
        "loss_itg": generation_loss(matcher, batch),
    }
    parameters = list(matcher.parameters())
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, rtol=0, atol=1e-5)
    total = torch.stack(list(expected.values())).sum()
    gradients, separate = (torch.autograd.grad(each, parameters) for each in (losses["loss"], total))
    for ours, theirs in zip(gradients, separate, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def test_itg_by_the_cache_equals_itg_by_the_explicit_mask() -> None:
    """The largest difference of a logit is 2e-5, where logits have a deviation of 1.7 (float32)."""
    batch = batch_of(["a red circle", "a blue star above a circle", "a"])
    keys_values = MATCHER.encode_image_queries(batch.image_features).keys_values
    by_cache = MATCHER.generation_logits(batch.input_ids, batch.attention_mask, keys_values)
    assert MATCHER.text_head is not None
    states = joint_states(MATCHER, batch.input_ids, batch.attention_mask, batch.image_features)
    is_text = batch.attention_mask.bool()
    torch.testing.assert_close(by_cache[is_text], MATCHER.text_head(states)[is_text], rtol=0, atol=5e-5)


def test_a_batch_of_one_has_finite_losses_and_gradients_and_matches_its_own_pair_alone() -> None:
    matcher, batch = build_matcher(), batch_of(["a red circle"])
    losses = stage1_losses(matcher, batch, num_pairs=32)
    logits = matcher.match_logits(batch.image_features, batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(losses["loss_itm"], -logits.log_softmax(dim=1)[0, 1])
    assert losses["loss_itc"].item() == pytest.approx(0.0, abs=1e-6)  # of one text, the right one
    torch.autograd.backward(losses["loss"])
    for name, parameter in matcher.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert all(figure.isfinite() for figure in losses.values())


def test_the_figures_are_those_of_the_step_and_have_no_gradient() -> None:
    matcher = build_matcher()
    with torch.no_grad():  # an answer that no pair changes: the prior
        matcher.itm_head.weight.zero_()
        matcher.itm_head.bias.copy_(torch.tensor([2 / 3, 1 / 3]).log())
    batch = batch_of(["a red circle", "a blue circle", "a green circle"])
    losses = stage1_losses(matcher, batch, 3)
    figures = {name: losses[name] for name in ("itm_accuracy", "itm_margin", "query_cosine", "temperature")}
    assert not any(figure.requires_grad for figure in figures.values())
    assert figures["itm_accuracy"].item() == pytest.approx(2 / 3)
    assert figures["itm_margin"].item() == pytest.approx(0.0, abs=1e-6)
    assert figures["temperature"].item() == pytest.approx(0.07)
    output = matcher.encode_image_queries(batch.image_features).query_output
    torch.testing.assert_close(figures["query_cosine"], query_cosine(output))
