"""Keys and values of growing texts, where the rows of one sequence share all that they have in common.

A sequence has one line of columns in each layer, [H, C, K]: its prefix, then a column for each token that
any of its rows took. Which row sees which column is a table of truth values, the same for all layers. Where
rows change places only the table changes, and a column that no row sees any more is written anew.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache, PreTrainedModel

from model.devices import upload
from model.language.attention import Look, StepCache, attending, with_prefixes
from model.language.kv_cache import Ids, Layer, Lines, Sight, room
from model.language.model_family import Extent, Family, Rows

_HIDDEN = torch.finfo(torch.float32).min  # not -inf: a row that is not in use sees nothing at all


def why_not(llm: PreTrainedModel) -> str | None:
    """Says what of a model does not fit; None where all does.

    It must attend by `transformers`' attention interface alone, in all layers to all tokens.
    """
    config = llm.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config.is_encoder_decoder and config.model_type not in ("t5", "mt5"):
        return f"it is an encoder-decoder of type {config.model_type!r}"
    if not (llm._supports_attention_backend or config.is_encoder_decoder):
        return "it attends by functions of its own"
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        return "it looks through a window"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps its attention scores"
    if any(name.endswith("sinks") for name, _ in llm.named_parameters()):
        return "it has attention sinks"
    return None


class SharedPrefixState:
    """See `model.language.family.DecodingState`."""

    def __init__(self, llm: PreTrainedModel, family: Family) -> None:
        self._config = llm.get_decoder().config
        self._device: torch.device = llm.get_input_embeddings().weight.device
        self._bytes_per_column = bytes_per_token(llm)
        self._is_encoder_decoder: bool = llm.config.is_encoder_decoder
        self._family = family
        self._own = Lines()
        self._sight = Sight()
        self._beside = Lines()
        self._extents: list[Extent] = []

    @property
    def _lengths_beside(self) -> Ids:
        """Of the prefixes that are looked at beside the own columns, [J]; 0 where they are part of those."""
        return np.array(
            [extent.num_prefix_tokens * self._is_encoder_decoder for extent in self._extents], np.int64
        )

    def admit(self, prefixes: Sequence[Tensor], extents: Sequence[Extent]) -> Tensor:
        self._extents += extents
        own_shape, beside_shape = self._shapes(self._extents)
        self._own.shrink(*self._sight.shape, most=math.prod(own_shape))
        self._beside.shrink(
            len(self._lengths_beside), self._lengths_beside.max(initial=0), most=math.prod(beside_shape)
        )
        reading = self._family.read(prefixes)
        first = len(self._sight.lengths)
        for layers, extent in zip(reading.own, extents, strict=True):
            self._sight.append(layers[0].keys.shape[1], extent.num_rows)
        self._own.reserve(*self._sight.shape, reading.own[0])
        for sequence, layers in enumerate(reading.own, start=first):
            self._own.put(sequence, layers)
        if reading.beside is not None:
            self._admit_beside(first, reading.beside)
        return reading.logits

    def _admit_beside(self, first: int, beside: Sequence[Sequence[Layer]]) -> None:
        self._beside.reserve(len(self._extents), self._lengths_beside.max(), beside[0])
        for sequence, layers in enumerate(beside, start=first):
            self._beside.put(sequence, layers)

    def retain(self, order: Sequence[int]) -> None:
        self._extents = [self._extents[number] for number in order]
        self._own.retain(order)
        self._sight.retain(order)
        self._beside.retain(order)

    def num_bytes(self, extents: Sequence[Extent]) -> int:
        return sum(map(math.prod, self._shapes(extents))) * self._bytes_per_column

    def _shapes(self, extents: Sequence[Extent]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Gives the sequences and columns that such sequences come to at most, own ones and those beside."""
        prefix = max(extent.num_prefix_tokens for extent in extents)
        suffix = [extent.num_rows * extent.max_new_tokens for extent in extents]
        if self._is_encoder_decoder:
            return room(len(extents), 1 + max(suffix)), room(len(extents), prefix)
        whole = (extent.num_prefix_tokens + new for extent, new in zip(extents, suffix, strict=True))
        return room(len(extents), max(whole)), (0, 0)

    def advance(self, rows: Rows) -> Tensor:
        slots = _places(rows.sequences)
        positions = self._sight.lengths[rows.sequences]
        columns = self._sight.grow(rows.sequences, slots, rows.parents)
        self._own.reserve(*self._sight.shape, self._own.layers)
        look = self._build_look(rows.sequences, slots)
        cache: Cache = StepCache(self._own.layers, look, self._tensor(rows.sequences), self._tensor(columns))
        if self._is_encoder_decoder:
            cache = with_prefixes(cache, self._beside.layers)
        with attending(self._config, look):
            return self._family.step(
                self._tensor(rows.token_ids)[:, None], self._tensor(positions)[:, None], cache
            )

    def _build_look(self, sequences: Ids, slots: Ids) -> Look:
        table = self._sight.table
        num_sequences, width, num_columns = table.shape
        is_full = len(slots) == num_sequences * width
        ages = self._sight.lengths[:, None] - 1 - self._sight.positions  # [J, C]
        widest = int(self._lengths_beside.max(initial=0))
        return Look(
            num_sequences=num_sequences,
            width=width,
            places=None if is_full else self._tensor(sequences * width + slots),
            hidden=self._hide(table),
            hidden_beside=self._hide((np.arange(widest) < self._lengths_beside[:, None])[:, None]),
            bias_columns=self._tensor(num_columns - 1 - ages.clip(0, num_columns - 1)),
        )

    def _hide(self, seen: NDArray[np.bool_]) -> Tensor:
        """Gives what is added to scores, [J, 1, W, 1, C]."""
        return self._tensor(np.where(seen, np.float32(0), np.float32(_HIDDEN)))[:, None, :, None]

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return upload(array, self._device)


def _places(sequences: Ids) -> Ids:
    """Counts the rows within each sequence: [0, 0, 0, 1, 1] gives [0, 1, 2, 0, 1]."""
    return np.arange(len(sequences)) - np.searchsorted(sequences, sequences)


def bytes_per_token(llm: PreTrainedModel) -> int:
    """Gives the bytes of one token's keys and values in all layers."""
    config = llm.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    layers: int = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    return 2 * layers * heads * size * llm.get_input_embeddings().weight.itemsize
