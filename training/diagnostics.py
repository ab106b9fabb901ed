"""Figures that show whether a Q-Former learns, beside its losses: pure functions, cheap enough for each step.

`itm_accuracy` is 2/3 and `itm_margin` 0 where matching stays at its prior. `query_cosine` is 1 where the
queries have collapsed into one.
"""

from math import log

from torch import Tensor
from torch.nn import functional as F


def itm_accuracy(logits: Tensor, num_positives: int) -> Tensor:
    """Compute the share of pairs judged right by [K, 2] matching logits; the first `num_positives` match."""
    is_match = logits.argmax(dim=1).bool()
    return (is_match[:num_positives].sum() + (~is_match[num_positives:]).sum()) / len(logits)


def itm_prior_loss(num_positives: int, num_pairs: int) -> float:
    """Compute the least matching loss, in nats, of a constant answer: .6365 where a third of pairs match."""
    shares = (num_positives / num_pairs, 1 - num_positives / num_pairs)
    return -sum(share * log(share) for share in shares if share)


def query_cosine(query_output: Tensor) -> Tensor:
    """Compute the mean cosine between outputs of different queries of an image, [B, Q, D]; 0 for Q = 1."""
    num_queries = query_output.shape[1]
    directions = F.normalize(query_output.detach().float(), dim=2)
    # The square of the sum holds every pair twice, and each query with itself once.
    both_ways = directions.sum(dim=1).square().sum(dim=1) - num_queries  # [B]
    return both_ways.mean() / max(1, num_queries * (num_queries - 1))
