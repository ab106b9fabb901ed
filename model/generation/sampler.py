"""Chooses, on the device, the tokens that may continue each row: a few out of the whole vocabulary."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.devices import upload
from model.generation import logits_processors as rules
from model.generation.batched_params import Flags, Ids, ParamTable

_BLOCK = 64  # tokens that are looked at together


class Draw(NamedTuple):
    """The rows of one job that are drawn at random, side by side, and its own source of chance."""

    rows: slice
    generator: torch.Generator


@dataclass(frozen=True, slots=True)
class Request:
    """What R rows ask for.

    params: of their jobs, one entry for each row. may_not_end: [R], where the answer is too short yet.
    histories: [R, T] ids, the newest last, `rules.NOTHING` in front; needed where `params.needs_history`.
    """

    params: ParamTable
    may_not_end: Flags
    histories: Ids
    draws: Sequence[Draw]


class Choice(NamedTuple):
    """The k tokens proposed for each of R rows, best first, and their log-probabilities, [R, k] each."""

    log_probs: Tensor
    token_ids: Tensor


class Chooser:
    """Chooses `count` tokens for rows of a beam search, and the one that goes on for all others.

    Log-probabilities of a beam search are those its rules left, those of other rows the bare model's.
    """

    def __init__(self, eos_token_ids: Sequence[int], device: torch.device) -> None:
        self._eos = torch.tensor(eos_token_ids, device=device)
        self._device = device

    def __call__(self, logits: Tensor, request: Request, count: int) -> Choice:
        """logits: [R, N], which may be changed. Launches work only: no sync."""
        totals = _log_totals(logits)
        scores, offsets = self._apply_rules(logits, totals, request)
        single = ~request.params.is_beam_search
        best, token_ids = _best(scores, min(1 if single.all() else count, logits.shape[-1]))
        choice = Choice(best - offsets, token_ids)
        if single.any():
            rows = self._index(single)
            token_ids = _race(scores, request.draws)[rows].argmax(dim=-1, keepdim=True)
            choice.token_ids[rows, :1] = token_ids
            choice.log_probs[rows, :1] = logits[rows].gather(1, token_ids) - totals[rows]
        return choice

    def _apply_rules(self, logits: Tensor, totals: Tensor, request: Request) -> tuple[Tensor, Tensor]:
        """Gives scores as the rules leave them, and what to take from them to have log-probabilities."""
        params = request.params
        is_ruled = params.needs_history | params.do_sample
        scores, offsets = logits, totals
        if is_ruled.any():
            ruled = self._index(is_ruled)
            (at,) = is_ruled.nonzero()
            # The reference has its rules see log-probabilities in a beam search, else logits.
            shifts = totals[ruled] * self._tensor(params.is_beam_search[at])[:, None]
            scores, offsets = logits.to(torch.float32, copy=True), totals.clone()
            scores[ruled] = self._ruled(logits[ruled] - shifts, request, at)
            offsets[ruled] = 0
        self._forbid_end(scores, request.may_not_end & ~is_ruled)
        return scores, offsets

    def _ruled(self, scores: Tensor, request: Request, rows: Ids) -> Tensor:
        """Applies to [r, N] scores what each of the rows asks for, in the reference's order."""
        params, histories = request.params.of_jobs(rows), request.histories[rows]
        sizes, draws = params.no_repeat_ngram_size, params.do_sample
        penalties = params.repetition_penalty
        self._change(scores, penalties != 1, rules.penalise_repetition, histories, penalties)
        for size in np.unique(sizes[sizes > 0]).tolist():
            self._change(scores, sizes == size, partial(rules.forbid_repeated_ngrams, size=size), histories)
        self._forbid_end(scores, request.may_not_end[rows])
        self._change(scores, sizes > 0, partial(rules.let_end, eos_token_ids=self._eos))
        self._change(scores, draws & (params.temperature != 1), rules.temper, params.temperature)
        self._change(scores, draws & (params.top_k > 0), rules.keep_top_k, params.top_k)
        self._change(scores, draws & (params.tail > 0), rules.drop_tail, params.tail)
        return scores

    def _change(
        self, scores: Tensor, where: Flags, rule: Callable[..., None], *arguments: NDArray[Any]
    ) -> None:
        """Applies a rule to some rows; arguments: of it, an entry for each row."""
        if where.any():
            rows = self._index(where)
            part = scores[rows]
            rule(part, *(self._tensor(argument[where]) for argument in arguments))
            scores[rows] = part

    def _forbid_end(self, scores: Tensor, where: Flags) -> None:
        if where.any():
            scores[self._index(where)[:, None], self._eos] = -torch.inf

    def _index(self, where: Flags) -> Tensor:
        return self._tensor(where.nonzero()[0])

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return upload(array, self._device)


def _log_totals(logits: Tensor) -> Tensor:
    """Gives what makes logits log-probabilities when it is taken from them, [R, 1] float32."""
    return torch.cat([part.logsumexp(dim=-1, keepdim=True) for part in _parts(logits)])


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Gives values, float32, and ids of the best tokens of each row, [R, k] each."""
    values, token_ids = zip(*(_best_of_blocks(part, count) for part in _parts(scores)), strict=True)
    return torch.cat(values), torch.cat(token_ids)


def _parts(scores: Tensor) -> Iterator[Tensor]:
    """Gives the rows in float32: on a CPU a few at a time, which stay in its cache, else all."""
    for part in torch.split(scores, 8 if scores.device.type == "cpu" else len(scores)):
        yield part.float()


def _best_of_blocks(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Does what topk does, in a fifth of its time on a CPU.

    The k best tokens are among those of the k blocks of tokens with the best maxima.
    """
    num_blocks = scores.shape[1] // _BLOCK
    if num_blocks <= count:
        values, token_ids = scores.topk(count)
        return values, token_ids
    num_blocked = num_blocks * _BLOCK
    maxima = scores[:, :num_blocked].view(len(scores), num_blocks, _BLOCK).amax(dim=-1)
    blocks = maxima.topk(count).indices  # [R, k]
    places = torch.arange(_BLOCK, device=scores.device)
    rest = torch.arange(num_blocked, scores.shape[1], device=scores.device).expand(len(scores), -1)
    token_ids = torch.cat([(blocks[:, :, None] * _BLOCK + places).flatten(1), rest], dim=1)
    best = scores.gather(1, token_ids).topk(count)
    return best.values, token_ids.gather(1, best.indices)


def _race(scores: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Makes the scores of rows that are drawn such that the greatest is a draw, in place.

    Of exponential times with the probabilities as rates the least is one of them with its probability;
    torch.multinomial draws so too.
    """
    for draw in draws:
        part = scores[draw.rows]
        times = torch.empty_like(part).exponential_(generator=draw.generator)
        part.copy_(part.softmax(dim=-1) / times)
    return scores
