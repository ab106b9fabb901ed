"""The figures that show whether a Q-Former learns, compared with values computed by hand."""

from itertools import combinations
from math import log

import pytest
import torch
from torch.nn import functional as F

from training.diagnostics import itm_accuracy, itm_prior_loss, query_cosine
from training.losses import itm_loss


def test_accuracy_counts_matched_pairs_first() -> None:
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [5.0, 1.0]])
    assert itm_accuracy(logits, 2).item() == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    ("positives", "pairs", "expected"),
    [(1, 3, 0.6365), (20, 60, 0.6365), (1, 2, log(2)), (1, 1, 0.0)],
)
def test_the_prior_loss_is_that_of_the_best_constant_answer(
    positives: int, pairs: int, expected: float
) -> None:
    assert itm_prior_loss(positives, pairs) == pytest.approx(expected, abs=5e-5)
    if positives < pairs:
        odds = torch.tensor([0.0, log(positives / (pairs - positives))])
        assert itm_loss(odds.expand(pairs, 2), positives).item() == pytest.approx(expected, abs=5e-5)


def test_query_cosine_is_the_mean_over_pairs_of_different_queries() -> None:
    torch.manual_seed(0)
    outputs = torch.randn(3, 5, 7) + 0.5
    pairs = list(combinations(range(5), 2))
    cosines = [F.cosine_similarity(image[i], image[j], dim=0) for image in outputs for i, j in pairs]
    torch.testing.assert_close(query_cosine(outputs), torch.stack(cosines).mean())


def test_equal_queries_have_cosine_one_opposite_ones_less_and_one_query_none() -> None:
    one = torch.randn(2, 1, 4)
    assert query_cosine(torch.cat([one, 2 * one, 3 * one], dim=1)).item() == pytest.approx(1)
    assert query_cosine(torch.cat([one, -one], dim=1)).item() == pytest.approx(-1)
    assert query_cosine(one).item() == pytest.approx(0, abs=1e-6)
