"""The sampler: selects, on the device, the few tokens that may continue each row."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.devices import upload
from model.generation import logits_processors
from model.generation.batched_params import BatchedParams, BoolArray
from model.language import IntArray

_BLOCK = 64  # tokens whose maximum is taken together
_CPU_CHUNK = 8  # rows that stay in a CPU's cache


class SampledRows(NamedTuple):
    """The adjacent rows of one sampled sequence, and its own random generator."""

    rows: slice
    generator: torch.Generator


@dataclass(frozen=True, slots=True)
class SamplerInput:
    """The parameters of R rows.

    params: of their sequences, one entry for each row. masks_eos: [R], the min_new_tokens mask: the answer is
    too short to end. histories: [R, T] ids, the newest last, `logits_processors.PADDING_ID` in front; needed
    where `params.needs_history`.
    """

    params: BatchedParams
    masks_eos: BoolArray
    histories: IntArray
    sampled: Sequence[SampledRows]


class TopK(NamedTuple):
    """The k best tokens for each of R rows, best first, and their log-probabilities, [R, k] each."""

    log_probs: Tensor
    token_ids: Tensor


class Sampler:
    """Selects `count` tokens for each row of a beam search, and one token for every other row.

    Log-probabilities of a beam search are those after its logits processors, those of other rows the bare
    model's.
    """

    def __init__(self, eos_token_ids: Sequence[int], device: torch.device) -> None:
        self._eos = torch.tensor(eos_token_ids, device=device)
        self._device = device

    def __call__(self, logits: Tensor, inputs: SamplerInput, count: int) -> TopK:
        """Select tokens by [R, N] logits, which may be changed. Launches work only: no sync."""
        normalizers = log_normalizers(logits)
        scores, offsets = self._process(logits, normalizers, inputs)
        is_single = ~inputs.params.is_beam_search
        best, token_ids = blockwise_topk(scores, min(1 if is_single.all() else count, logits.shape[-1]))
        top_k = TopK(best - offsets, token_ids)
        if is_single.any():
            rows = self._index(is_single)
            token_ids = _exponential_race(scores, inputs.sampled)[rows].argmax(dim=-1, keepdim=True)
            top_k.token_ids[rows, :1] = token_ids
            top_k.log_probs[rows, :1] = logits[rows].gather(1, token_ids) - normalizers[rows]
        return top_k

    def _process(self, logits: Tensor, normalizers: Tensor, inputs: SamplerInput) -> tuple[Tensor, Tensor]:
        """Return processed scores, and the offsets that turn them into log-probabilities, [R, 1]."""
        params = inputs.params
        is_processed = params.needs_history | params.do_sample
        scores, offsets = logits, normalizers
        if is_processed.any():
            index = self._index(is_processed)
            (rows,) = is_processed.nonzero()
            # The reference processes log-probabilities in a beam search, else logits.
            shifts = normalizers[index] * self._upload(params.is_beam_search[rows])[:, None]
            scores, offsets = logits.to(torch.float32, copy=True), normalizers.clone()
            scores[index] = self._apply_processors(logits[index] - shifts, inputs, rows)
            offsets[index] = 0
        self._mask_eos(scores, inputs.masks_eos & ~is_processed)
        return scores, offsets

    def _apply_processors(self, scores: Tensor, inputs: SamplerInput, rows: IntArray) -> Tensor:
        """Apply to [r, N] scores the logits processors of each row, in the reference's order."""
        params, histories = inputs.params.select(rows), inputs.histories[rows]
        sizes, do_sample = params.no_repeat_ngram_size, params.do_sample
        penalties = params.repetition_penalty
        self._apply(scores, penalties != 1, logits_processors.apply_repetition_penalty, histories, penalties)
        for size in np.unique(sizes[sizes > 0]).tolist():
            mask_ngrams = partial(logits_processors.mask_repeated_ngrams, size=size)
            self._apply(scores, sizes == size, mask_ngrams, histories)
        self._mask_eos(scores, inputs.masks_eos[rows])
        self._apply(scores, sizes > 0, partial(logits_processors.force_eos, eos_token_ids=self._eos))
        is_tempered = do_sample & (params.temperature != 1)
        self._apply(scores, is_tempered, logits_processors.apply_temperature, params.temperature)
        self._apply(scores, do_sample & (params.top_k > 0), logits_processors.apply_top_k, params.top_k)
        has_top_p = do_sample & (params.one_minus_top_p > 0)
        self._apply(scores, has_top_p, logits_processors.apply_top_p, params.one_minus_top_p)
        return scores

    def _apply(
        self, scores: Tensor, mask: BoolArray, processor: Callable[..., None], *arguments: NDArray[Any]
    ) -> None:
        """Apply a logits processor to the rows of a mask; arguments: one entry for each row."""
        if mask.any():
            rows = self._index(mask)
            masked_scores = scores[rows]
            processor(masked_scores, *(self._upload(argument[mask]) for argument in arguments))
            scores[rows] = masked_scores

    def _mask_eos(self, scores: Tensor, mask: BoolArray) -> None:
        if mask.any():
            scores[self._index(mask)[:, None], self._eos] = -torch.inf

    def _index(self, mask: BoolArray) -> Tensor:
        return self._upload(mask.nonzero()[0])

    def _upload(self, array: NDArray[Any]) -> Tensor:
        return upload(array, self._device)


def log_normalizers(logits: Tensor) -> Tensor:
    """Return the log of the softmax's denominator, [R, 1] float32; logits minus it are log-probabilities."""
    return torch.cat([chunk.logsumexp(dim=-1, keepdim=True) for chunk in _float_chunks(logits)])


def blockwise_topk(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the float32 values and the ids of the best tokens of each row, [R, k] each."""
    values, token_ids = zip(*(_topk_of_chunk(chunk, count) for chunk in _float_chunks(scores)), strict=True)
    return torch.cat(values), torch.cat(token_ids)


def _float_chunks(scores: Tensor) -> Iterator[Tensor]:
    """Yield the rows in float32: on a CPU a few at a time, which stay in its cache, else all."""
    for chunk in torch.split(scores, _CPU_CHUNK if scores.device.type == "cpu" else len(scores)):
        yield chunk.float()


def _topk_of_chunk(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Compute topk in a fifth of the time that torch's takes on a CPU.

    The k best tokens are among those of the k blocks of tokens with the best maxima.
    """
    num_blocks = scores.shape[1] // _BLOCK
    if num_blocks <= count:
        values, token_ids = scores.topk(count)
        return values, token_ids
    num_blocked = num_blocks * _BLOCK
    maxima = scores[:, :num_blocked].view(len(scores), num_blocks, _BLOCK).amax(dim=-1)
    blocks = maxima.topk(count).indices  # [R, k]
    offsets = torch.arange(_BLOCK, device=scores.device)
    rest = torch.arange(num_blocked, scores.shape[1], device=scores.device).expand(len(scores), -1)
    token_ids = torch.cat([(blocks[:, :, None] * _BLOCK + offsets).flatten(1), rest], dim=1)
    best = scores.gather(1, token_ids).topk(count)
    return best.values, token_ids.gather(1, best.indices)


def _exponential_race(scores: Tensor, sampled: Sequence[SampledRows]) -> Tensor:
    """Replace the scores of sampled rows, in place, so that the argmax is a sample.

    Exponential race (equivalent to Gumbel-max), as in torch.multinomial: of exponential times with the
    probabilities as rates, each is the least with its probability.
    """
    for sequence in sampled:
        row_scores = scores[sequence.rows]
        times = torch.empty_like(row_scores).exponential_(generator=sequence.generator)
        row_scores.copy_(row_scores.softmax(dim=-1) / times)
    return scores
