"""The best tokens out of a vocabulary, found block by block."""

import pytest
import torch

from model.generation.sampler import _best, _log_totals


@pytest.mark.parametrize("num_tokens", [1, 46, 64 * 3, 64 * 11, 5000, 32128, 50272])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_tokens_are_those_of_topk(num_tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    scores = torch.randn(19, num_tokens, generator=generator).to(dtype)
    scores[0] = -torch.inf
    scores[1] = scores[1].sort(descending=True).values  # all of the best in one block
    scores[2, -1] = 9.0  # in what is no whole block
    for count in {1, min(10, num_tokens), min(48, num_tokens)}:
        values, token_ids = _best(scores, count)
        expected = scores.float().topk(count).values
        assert torch.equal(values, expected)
        assert torch.equal(scores.float().gather(1, token_ids), expected)
        assert all(len(set(row)) == count for row in token_ids.tolist())


def test_totals_make_log_probabilities_of_logits() -> None:
    logits = torch.randn(19, 500).bfloat16()
    torch.testing.assert_close(logits.float() - _log_totals(logits), logits.float().log_softmax(dim=-1))
