import torch

from tests.builders import build_matcher
from training.finetune import retrieval_losses, same_captions
from training.losses import itc_loss
from training.stage1 import contrast, matching_loss, stage1_losses


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    matcher = build_matcher()
    features = torch.randn(size, 17, matcher.config.encoder_hidden_size)
    input_ids, attention_mask = matcher.tokenize(
        [f"a {color} circle" for color in ("red", "green", "blue")[:size]]
    )
    return features, input_ids, attention_mask, torch.eye(size, dtype=torch.bool)


def test_scenes_with_the_same_listing_match_each_other() -> None:
    assert same_captions(["a", "b", "a"]).tolist() == [
        [True, False, True],
        [False, True, False],
        [True, False, True],
    ]


def test_contrast_covers_the_batch_and_matching_its_first_pairs() -> None:
    matcher = build_matcher()
    features, input_ids, attention_mask, matches = batch(3)
    query_output = matcher.encode_image_queries(features).query_output
    similarities = contrast(matcher, query_output, input_ids, attention_mask)
    torch.manual_seed(1)
    losses = retrieval_losses(matcher, features, input_ids, attention_mask, matches, num_pairs=1)
    assert losses["loss_itc"].item() == itc_loss(similarities, matches).item()
    torch.manual_seed(1)
    matched = matching_loss(matcher, features, input_ids, attention_mask, similarities, matches, 1)
    assert losses["loss_itm"].item() == matched.item()
    assert losses["loss"].item() == (losses["loss_itc"] + losses["loss_itm"]).item()


def test_the_loss_of_stage_1_is_the_sum_of_three_that_all_reach_the_queries() -> None:
    matcher = build_matcher()
    losses = stage1_losses(matcher, *batch(3))
    parts = [losses[name] for name in ("loss_itc", "loss_itm", "loss_itg")]
    torch.testing.assert_close(losses["loss"], torch.stack(parts).sum())
    for part in parts:
        (gradient,) = torch.autograd.grad(part, matcher.query_tokens, retain_graph=True)
        assert gradient.abs().sum() > 0
