import math

import pytest
import torch

from tests.builders import build_matcher
from training.stages.text_head import caption_greedily, text_loss


def test_a_text_head_that_knows_nothing_loses_the_logarithm_of_its_vocabulary_per_token() -> None:
    matcher = build_matcher()
    assert matcher.text_head is not None
    with torch.no_grad():
        matcher.embeddings.word_embeddings.weight.zero_()
        matcher.text_head.bias.zero_()
    loss = text_loss(matcher, torch.randn(3, 17, 48), ["a red circle", "a star", "a blue star above a cross"])
    assert loss == pytest.approx(math.log(matcher.config.vocab_size), rel=1e-5)


def test_a_caption_of_the_text_head_ends_at_its_end_token_or_at_the_last_position() -> None:
    matcher = build_matcher()
    assert matcher.text_head is not None
    images = torch.randn(3, 17, 48)
    with torch.no_grad():
        matcher.text_head.bias[matcher.tokenizer.sep_token_id] = 1e4
        assert caption_greedily(matcher, images, beginning="a") == ["a", "a", "a"]
        matcher.text_head.bias[matcher.tokenizer.convert_tokens_to_ids("star")] = 2e4
        longest = " ".join(["a", *["star"] * (matcher.max_text_tokens - 2)])
        assert caption_greedily(matcher, images, beginning="a") == [longest] * 3
