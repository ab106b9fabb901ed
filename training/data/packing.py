"""Sequence packing: several texts about one image behind one prefix, without attention between texts.

A packed sequence is `[prefix | text 1 | text 2 | …]`. The prefix (visual tokens, or a description in their
place) is causal. A text attends to the prefix and to its own past. Its positions start behind the prefix, so
each text is computed exactly as if it were alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_PADDING_SEGMENT = -1
_PREFIX_SEGMENT = -2


@dataclass(frozen=True, slots=True)
class WeightedText:
    """Token ids of one text, with its special tokens, and the loss weight of each (0: not a target)."""

    token_ids: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """B packed sequences of T text tokens behind a prefix of Q tokens, with K targets.

    `input_ids`, `position_ids` and `segments` (index of a token's text; -1: padding) are [B, T] int64.
    `kept_columns` [C] are the positions of the whole sequence, ascending, that predict a target. Target k is
    `labels[k]` with loss weight `weights[k]`, predicted in row `target_rows[k]` from position
    `kept_columns[target_columns[k]]`: that of the token before it, which for the first token of a text is
    the last of the prefix.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    kept_columns: Tensor
    target_rows: Tensor
    target_columns: Tensor
    labels: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> "PackedBatch":
        return PackedBatch(*(getattr(self, name).to(device) for name in self.__slots__))


def pack_texts(rows: Sequence[Sequence[WeightedText]], prefix_length: int, pad_token_id: int) -> PackedBatch:
    """Pack each image's texts into one sequence, padded on the right to the longest."""
    length = max(sum(len(text.token_ids) for text in texts) for texts in rows)
    shape = (len(rows), length)
    input_ids = torch.full(shape, pad_token_id)
    position_ids = torch.zeros(shape, dtype=torch.long)
    segments = torch.full(shape, _PADDING_SEGMENT)
    for row, texts in enumerate(rows):
        for segment, (text, start) in enumerate(zip(texts, text_starts(texts, 0), strict=True)):
            end = start + len(text.token_ids)
            input_ids[row, start:end] = torch.tensor(text.token_ids)
            position_ids[row, start:end] = torch.arange(prefix_length, prefix_length + end - start)
            segments[row, start:end] = segment
    return PackedBatch(input_ids, position_ids, segments, *_find_targets(rows, prefix_length))


def _find_targets(
    rows: Sequence[Sequence[WeightedText]], prefix_length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return kept columns and target rows, target columns, labels and weights, as in `PackedBatch`."""
    targets = [
        (row, start + offset - 1 if offset else prefix_length - 1, token_id, weight)
        for row, texts in enumerate(rows)
        for text, start in zip(texts, text_starts(texts, prefix_length), strict=True)
        for offset, (token_id, weight) in enumerate(zip(text.token_ids, text.weights, strict=True))
        if weight > 0
    ]
    target_rows, columns, labels, weights = zip(*targets, strict=True) if targets else ((), (), (), ())
    kept_columns, target_columns = torch.tensor(columns, dtype=torch.long).unique(return_inverse=True)
    as_ids = [torch.tensor(each, dtype=torch.long) for each in (target_rows, labels)]
    return kept_columns, as_ids[0], target_columns, as_ids[1], torch.tensor(weights)


def text_starts(texts: Sequence[WeightedText], prefix_length: int) -> list[int]:
    """Return the position of the first token of each text in a packed sequence."""
    lengths = [len(text.token_ids) for text in texts]
    return [prefix_length + sum(lengths[:k]) for k in range(len(texts))]


def packed_attention_mask(segments: Tensor, prefix_length: int, dtype: torch.dtype) -> Tensor:
    """Build the additive attention mask [B, 1, Q+T, Q+T] of packed sequences: 0, or the dtype's minimum."""
    batch_size, length = segments.shape
    all_segments = torch.cat(
        [segments.new_full((batch_size, prefix_length), _PREFIX_SEGMENT), segments], dim=1
    )  # [B, Q+T]
    size = prefix_length + length
    causal = torch.ones(size, size, dtype=torch.bool, device=segments.device).tril()
    in_prefix = torch.arange(size, device=segments.device) < prefix_length
    same_text = all_segments[:, :, None] == all_segments[:, None, :]
    visible = causal & (same_text | in_prefix)  # padding attends to itself and the prefix: no row is empty
    mask = torch.zeros(visible.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]
