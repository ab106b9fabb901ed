"""Several texts about one image in one sequence: the prefix is read once, and no text sees another.

A packed sequence is `[prefix | text 1 | text 2 | …]`. The prefix (visual tokens, or a description in their
place) is causal; a text sees the prefix and its own past, and its positions begin right behind the prefix,
so that each text is computed just as if it stood there alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_PADDING = -1


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids of one text, begin token first, and the loss weight of each (0: not a target)."""

    token_ids: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PackedTexts:
    """A batch of packed texts behind a prefix of Q tokens; B sequences of T text tokens.

    `input_ids`, `position_ids` and `segments` (which text a token is of; -1: padding) are [B, T] int64;
    `labels` [B, T] holds the next token of the same text (-100 where there is none) and `weights` [B, T] its
    loss weight.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    labels: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> "PackedTexts":
        return PackedTexts(*(getattr(self, name).to(device) for name in self.__slots__))


def pack_texts(batch: Sequence[Sequence[Text]], prefix_length: int, pad_token_id: int) -> PackedTexts:
    """Packs each image's texts into one sequence, padded on the right to the longest."""
    length = max(sum(len(text.token_ids) for text in texts) for texts in batch)
    shape = (len(batch), length)
    packed = PackedTexts(
        input_ids=torch.full(shape, pad_token_id),
        position_ids=torch.zeros(shape, dtype=torch.long),
        segments=torch.full(shape, _PADDING),
        labels=torch.full(shape, -100),
        weights=torch.zeros(shape),
    )
    for row, texts in enumerate(batch):
        start = 0
        for segment, text in enumerate(texts):
            end = start + len(text.token_ids)
            ids = torch.tensor(text.token_ids)
            packed.input_ids[row, start:end] = ids
            packed.position_ids[row, start:end] = torch.arange(prefix_length, prefix_length + len(ids))
            packed.segments[row, start:end] = segment
            packed.labels[row, start : end - 1] = ids[1:]
            packed.weights[row, start : end - 1] = torch.tensor(text.weights[1:])
            start = end
    return packed


def text_starts(texts: Sequence[Text], prefix_length: int) -> list[int]:
    """Where each text of one packed sequence begins."""
    lengths = [len(text.token_ids) for text in texts]
    return [prefix_length + sum(lengths[:k]) for k in range(len(texts))]


def packed_mask(segments: Tensor, prefix_length: int, dtype: torch.dtype) -> Tensor:
    """The additive mask [B, 1, Q+T, Q+T] of packed texts: 0 where visible, else the least number."""
    batch, length = segments.shape
    everywhere = torch.cat([segments.new_full((batch, prefix_length), -2), segments], dim=1)  # [B, Q+T]
    size = prefix_length + length
    causal = torch.ones(size, size, dtype=torch.bool, device=segments.device).tril()
    in_prefix = torch.arange(size, device=segments.device) < prefix_length
    same_text = everywhere[:, :, None] == everywhere[:, None, :]
    visible = causal & (same_text | in_prefix)  # padding sees itself and the prefix: no row is empty
    mask = torch.zeros(visible.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]
