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
_IGNORED = -100


@dataclass(frozen=True, slots=True)
class WeightedText:
    """Token ids of one text, begin token first, and the loss weight of each (0: not a target)."""

    token_ids: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """B packed sequences of T text tokens behind a prefix of Q tokens.

    `input_ids`, `position_ids` and `segments` (index of a token's text; -1: padding) are [B, T] int64;
    `labels` [B, T] holds the next token of the same text (-100: none) and `weights` [B, T] its loss weight.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    labels: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> "PackedBatch":
        return PackedBatch(*(getattr(self, name).to(device) for name in self.__slots__))


def pack_texts(rows: Sequence[Sequence[WeightedText]], prefix_length: int, pad_token_id: int) -> PackedBatch:
    """Pack each image's texts into one sequence, padded on the right to the longest."""
    length = max(sum(len(text.token_ids) for text in texts) for texts in rows)
    shape = (len(rows), length)
    batch = PackedBatch(
        input_ids=torch.full(shape, pad_token_id),
        position_ids=torch.zeros(shape, dtype=torch.long),
        segments=torch.full(shape, _PADDING_SEGMENT),
        labels=torch.full(shape, _IGNORED),
        weights=torch.zeros(shape),
    )
    for row, texts in enumerate(rows):
        start = 0
        for segment, text in enumerate(texts):
            end = start + len(text.token_ids)
            ids = torch.tensor(text.token_ids)
            batch.input_ids[row, start:end] = ids
            batch.position_ids[row, start:end] = torch.arange(prefix_length, prefix_length + len(ids))
            batch.segments[row, start:end] = segment
            batch.labels[row, start : end - 1] = ids[1:]
            batch.weights[row, start : end - 1] = torch.tensor(text.weights[1:])
            start = end
    return batch


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
