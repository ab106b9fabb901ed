"""The sampler: the best tokens of a vocabulary, found block by block, and their log-probabilities."""

import pytest
import torch

from model.generation.sampler import blockwise_topk, log_normalizers


@pytest.mark.parametrize("num_tokens", [1, 46, 64 * 3, 64 * 11, 5000, 32128, 50272])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_tokens_are_those_of_topk(num_tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    scores = torch.randn(19, num_tokens, generator=generator).to(dtype)
    scores[0] = -torch.inf
    scores[1] = scores[1].sort(descending=True).values  # all of the best in one block
    scores[2, -1] = 9.0  # in what is no whole block
    for count in {1, min(10, num_tokens), min(48, num_tokens)}:
        values, token_ids = blockwise_topk(scores, count)
        expected = scores.float().topk(count).values
        assert torch.equal(values, expected)
        assert torch.equal(scores.float().gather(1, token_ids), expected)
        assert all(len(set(row)) == count for row in token_ids.tolist())


def test_logits_minus_their_normalizers_are_log_probabilities() -> None:
    logits = torch.randn(19, 500).bfloat16()
    torch.testing.assert_close(logits.float() - log_normalizers(logits), logits.float().log_softmax(dim=-1))
