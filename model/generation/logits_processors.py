"""What a job's parameters do to the scores of its next tokens, for many rows of many jobs at once.

Each rule is that of transformers' logits processor of the same purpose, on a job that runs alone. Scores are
[R, N] float32 and changed in place; parameters have one entry for each row.
"""

import torch
from torch import Tensor

NOTHING = -1  # stands in a history in front of its first token


def penalise_repetition(scores: Tensor, history: Tensor, penalties: Tensor) -> None:
    """Divides positive scores of tokens seen before by the penalty, multiplies negative ones by it.

    history: [R, T] ids, the newest last, NOTHING in front. penalties: [R].
    """
    seen = torch.where(history == NOTHING, history[:, -1:], history)
    found = scores.gather(1, seen)
    penalties = penalties[:, None]
    scores.scatter_(1, seen, torch.where(found < 0, found * penalties, found / penalties))


def forbid_repeated_ngrams(scores: Tensor, history: Tensor, size: int) -> None:
    """Rules out tokens that would make an n-gram of this size occur a second time in its history, [R, T]."""
    if history.shape[1] < size:
        return
    ngrams = history.unfold(1, size, 1)  # [R, T - n + 1, n]
    newest = history[:, history.shape[1] - size + 1 :]  # [R, n - 1]
    is_repeated = (ngrams[:, :, :-1] == newest[:, None]).all(dim=-1) & (ngrams[:, :, -1] != NOTHING)
    num_tokens = scores.shape[1]
    forbidden = torch.where(is_repeated, ngrams[:, :, -1], num_tokens)
    mask = torch.zeros(len(scores), num_tokens + 1, dtype=torch.bool, device=scores.device)
    scores.masked_fill_(mask.scatter_(1, forbidden, True)[:, :num_tokens], -torch.inf)


def let_end(scores: Tensor, eos_token_ids: Tensor) -> None:
    """Has a row end where every token is ruled out, for nothing could be chosen from it."""
    is_lost = scores.isneginf().all(dim=-1, keepdim=True)  # [R, 1]
    scores[:, eos_token_ids] = torch.where(is_lost, 0.0, scores[:, eos_token_ids])


def temper(scores: Tensor, temperatures: Tensor) -> None:
    """Divides by the temperature; temperatures: [R]."""
    scores /= temperatures[:, None]


def keep_top_k(scores: Tensor, top_k: Tensor) -> None:
    """Rules out all tokens but the k most likely; top_k: [R]."""
    ranked = scores.sort(dim=-1, descending=True).values
    last = top_k.clamp(max=scores.shape[1])[:, None] - 1
    scores.masked_fill_(scores < ranked.gather(1, last), -torch.inf)


def drop_tail(scores: Tensor, tails: Tensor) -> None:
    """Rules out the least likely tokens, of a probability 1 - top_p at most together.

    tails: [R], 1 - top_p.
    """
    ranked, token_ids = scores.sort(dim=-1)
    is_out = ranked.softmax(dim=-1).cumsum(dim=-1) <= tails[:, None]
    is_out[:, -1] = False  # one is always left
    scores.masked_fill_(is_out.scatter(1, token_ids, is_out), -torch.inf)
