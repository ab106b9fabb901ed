"""Logits processors: rules that change the scores of next tokens, for many rows at once.

Each rule is that of transformers' logits processor of the same purpose, on a sequence that runs alone. Scores
are [R, N] float32 and changed in place; parameters have one entry for each row.
"""

import torch
from torch import Tensor

PADDING_ID = -1  # stands in a history in front of its first token


def apply_repetition_penalty(scores: Tensor, history: Tensor, penalties: Tensor) -> None:
    """Divide positive scores of tokens in the history by the penalty, multiply negative ones by it.

    history: [R, T] ids, the newest last, PADDING_ID in front. penalties: [R].
    """
    seen = torch.where(history == PADDING_ID, history[:, -1:], history)
    seen_scores = scores.gather(1, seen)
    penalties = penalties[:, None]
    scores.scatter_(1, seen, torch.where(seen_scores < 0, seen_scores * penalties, seen_scores / penalties))


def mask_repeated_ngrams(scores: Tensor, history: Tensor, size: int) -> None:
    """Mask tokens that would repeat an n-gram of this size in their history, [R, T]."""
    if history.shape[1] < size:
        return
    ngrams = history.unfold(1, size, 1)  # [R, T - n + 1, n]
    newest = history[:, history.shape[1] - size + 1 :]  # [R, n - 1]
    is_repeated = (ngrams[:, :, :-1] == newest[:, None]).all(dim=-1) & (ngrams[:, :, -1] != PADDING_ID)
    num_tokens = scores.shape[1]
    repeated = torch.where(is_repeated, ngrams[:, :, -1], num_tokens)
    mask = torch.zeros(len(scores), num_tokens + 1, dtype=torch.bool, device=scores.device)
    scores.masked_fill_(mask.scatter_(1, repeated, True)[:, :num_tokens], -torch.inf)


def force_eos(scores: Tensor, eos_token_ids: Tensor) -> None:
    """Force an end token where all tokens of a row are masked."""
    is_masked = scores.isneginf().all(dim=-1, keepdim=True)  # [R, 1]
    scores[:, eos_token_ids] = torch.where(is_masked, 0.0, scores[:, eos_token_ids])


def apply_temperature(scores: Tensor, temperatures: Tensor) -> None:
    """Divide scores by the temperature; temperatures: [R]."""
    scores /= temperatures[:, None]


def apply_top_k(scores: Tensor, top_k: Tensor) -> None:
    """Mask all tokens but the k most likely; top_k: [R]."""
    ranked = scores.sort(dim=-1, descending=True).values
    last = top_k.clamp(max=scores.shape[1])[:, None] - 1
    scores.masked_fill_(scores < ranked.gather(1, last), -torch.inf)


def apply_top_p(scores: Tensor, one_minus_top_p: Tensor) -> None:
    """Mask the least likely tokens, whose cumulative probability is at most 1 - top_p (nucleus sampling).

    one_minus_top_p: [R].
    """
    ranked, token_ids = scores.sort(dim=-1)
    is_masked = ranked.softmax(dim=-1).cumsum(dim=-1) <= one_minus_top_p[:, None]
    is_masked[:, -1] = False  # at least one token is left
    scores.masked_fill_(is_masked.scatter(1, token_ids, is_masked), -torch.inf)
