"""Keys and values of growing texts, where the rows of one sequence share all that they have in common.

The seams are `transformers`' own: a `Cache` that takes each layer's keys and values in, and an attention
function, registered by name, that looks at them. Any model that uses both runs on it as it is.

A sequence has one line of columns in each layer, [H, C, K]: its prefix, then a column for each token that
any of its rows took. Which row sees which column is a table of truth values, the same for all layers. Where
rows change places only the table changes, and a column that no row sees any more is written anew.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, EncoderDecoderCache, PreTrainedConfig, PreTrainedModel

from model.language.family import Extent, Ids, Rows

NAME = "shared_prefix"
_COLUMNS = 16  # that lines grow by, so that shapes come again
_HIDDEN = torch.finfo(torch.float32).min  # not -inf: a line that nobody reads has no column to see


def why_not(llm: PreTrainedModel) -> str | None:
    """Says what of a model does not fit, None where all does: only `transformers`' attention interface,
    and in all layers attention to all tokens."""
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
    return None


class Layer(NamedTuple):
    """Keys and values of all sequences in one layer, [J, H, C, K] each."""

    keys: Tensor
    values: Tensor

    def part(self, sequence: int, columns: slice) -> "Layer":
        """Gives those of one sequence, [H, C, K] each."""
        return Layer(self.keys[sequence, :, columns], self.values[sequence, :, columns])


class Lines:
    """Room for the columns of sequences in all layers."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def reserve(self, num_sequences: int, num_columns: int, like: Sequence[Layer]) -> None:
        """Makes room, keeping what there is; like: tensors of the types and on the devices wanted."""
        held = self.layers or [Layer(*(tensor[None, :, :0] for tensor in layer)) for layer in like]
        sequences, _, columns, _ = held[0].keys.shape
        if num_sequences <= sequences and num_columns <= columns:
            return
        shape = room(num_sequences, num_columns)
        self.layers = held  # replaced one by one, so that no more than one layer is there twice
        for number, layer in enumerate(held):
            held[number] = Layer(*(_moved(tensor, *shape) for tensor in layer))

    def put(self, sequence: int, layers: Sequence[Layer]) -> None:
        """Writes the first columns of a sequence; layers: [H, S, K] each."""
        for held, new in zip(self.layers, layers, strict=True):
            for target, source in zip(held, new, strict=True):
                target[sequence, :, : source.shape[1]] = source
                target[sequence, :, source.shape[1] :] = 0  # a sequence gone may have left NaN

    def retain(self, order: Sequence[int]) -> None:
        moved = [(new, old) for new, old in enumerate(order) if new != old]
        for tensor in (tensor for layer in self.layers for tensor in layer):
            for new, old in moved:
                tensor[new] = tensor[old]


def room(num_sequences: int, num_columns: int) -> tuple[int, int]:
    """Rounds up what is held, so that shapes come again and seldom grow."""
    return 1 << (num_sequences - 1).bit_length(), -(-num_columns // 64) * 64


def _moved(tensor: Tensor, sequences: int, columns: int) -> Tensor:
    """Gives a copy of [J, H, C, K] keys with more room, or less where it is no longer needed."""
    grown = tensor.new_zeros(sequences, tensor.shape[1], columns, tensor.shape[3])
    kept = tensor[:sequences, :, :columns]
    grown[: kept.shape[0], :, : kept.shape[2]] = kept
    return grown


class Sight:
    """Which row of a sequence sees which column.

    table: [J, W, C]. positions: [J, C], in its text, of the token in a column. lengths: [J], of the texts.
    """

    def __init__(self) -> None:
        self.table: NDArray[np.bool_] = np.zeros((0, 1, 0), bool)
        self.positions: Ids = np.zeros((0, 0), np.int64)
        self.lengths: Ids = np.zeros(0, np.int64)
        self._widths: Ids = np.zeros(0, np.int64)

    @property
    def num_sequences(self) -> int:
        return self.table.shape[0]

    @property
    def num_columns(self) -> int:
        return self.table.shape[2]

    def append(self, length: int, width: int) -> None:
        """Takes a sequence in, whose first row sees a prefix of so many columns."""
        sequence, rows, columns = self.table.shape
        self._pad(1, max(0, width - rows), max(0, _rounded(length) - columns))
        self.table[sequence, 0, :length] = True
        self.positions[sequence, :length] = np.arange(length)
        self.lengths = np.append(self.lengths, length)
        self._widths = np.append(self._widths, width)

    def retain(self, order: Sequence[int]) -> None:
        index = np.array(order, dtype=np.int64)
        self.lengths, self._widths = self.lengths[index], self._widths[index]
        rows = self._widths.max(initial=1)
        columns = _rounded(int(np.flatnonzero(self.table[index].any(axis=(0, 1))).max(initial=-1)) + 1)
        self.table = self.table[index, :rows, :columns]
        self.positions = self.positions[index, :columns]

    def grow(self, sequences: Ids, slots: Ids, parents: Ids) -> Ids:
        """Has R rows see what their parents saw, and a free column each; gives those columns, [R]."""
        seen = self.table[sequences, parents]  # [R, C]
        self.table[:] = False
        self.table[sequences, slots] = seen
        wanted = np.bincount(sequences, minlength=len(self.table)).max()
        free = ~self.table.any(axis=1)  # [J, C]
        if free.sum(axis=1).min() < wanted:
            self._pad(0, 0, _COLUMNS)
            free = ~self.table.any(axis=1)
        columns: Ids = np.argsort(~free, axis=1, kind="stable")[sequences, slots]
        self.table[sequences, slots, columns] = True
        self.positions[sequences, columns] = self.lengths[sequences]
        self.lengths = self.lengths + 1
        return columns

    def _pad(self, sequences: int, rows: int, columns: int) -> None:
        self.table = np.pad(self.table, ((0, sequences), (0, rows), (0, columns)))
        self.positions = np.pad(self.positions, ((0, sequences), (0, columns)))


def _rounded(num_columns: int) -> int:
    return -(-num_columns // _COLUMNS) * _COLUMNS


class Reading(NamedTuple):
    """What a family makes of J prefixes that were read together.

    logits: [J, N], of the next token. own: for each sequence the layers that its rows go on from. beside:
    those that they look at beside (an encoder-decoder's prefix), or None.
    """

    logits: Tensor
    own: Sequence[Sequence[Layer]]
    beside: Sequence[Sequence[Layer]] | None = None


Read = Callable[[Sequence[Tensor]], Reading]
Step = Callable[[Tensor, Tensor, Cache], Tensor]  # [R, 1] ids and positions: [R, N] logits


class SharedPrefixState:
    """See `model.language.family.DecodingState`. read, step: of the family."""

    def __init__(self, llm: PreTrainedModel, read: Read, step: Step) -> None:
        self._config = llm.get_decoder().config
        self._device: torch.device = llm.get_input_embeddings().weight.device
        self._bytes_per_column = bytes_per_token(llm)
        self._is_encoder_decoder: bool = llm.config.is_encoder_decoder
        self._read = read
        self._step = step
        self._own = Lines()
        self._sight = Sight()
        self._beside = Lines()
        self._lengths_beside: Ids = np.zeros(0, np.int64)

    def admit(self, prefixes: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
        reading = self._read(prefixes)
        first = len(self._sight.lengths)
        for layers, width in zip(reading.own, widths, strict=True):
            self._sight.append(layers[0].keys.shape[1], width)
        self._own.reserve(self._sight.num_sequences, self._sight.num_columns, reading.own[0])
        for sequence, layers in enumerate(reading.own, start=first):
            self._own.put(sequence, layers)
        if reading.beside is not None:
            self._admit_beside(first, reading.beside)
        return reading.logits

    def _admit_beside(self, first: int, beside: Sequence[Sequence[Layer]]) -> None:
        lengths = [layers[0].keys.shape[1] for layers in beside]
        self._lengths_beside = np.append(self._lengths_beside, lengths)
        self._beside.reserve(len(self._lengths_beside), self._lengths_beside.max(), beside[0])
        for sequence, layers in enumerate(beside, start=first):
            self._beside.put(sequence, layers)

    def retain(self, order: Sequence[int]) -> None:
        self._own.retain(order)
        self._sight.retain(order)
        if self._is_encoder_decoder:
            self._beside.retain(order)
            self._lengths_beside = self._lengths_beside[np.array(order, dtype=np.int64)]

    def num_bytes(self, extents: Sequence[Extent]) -> int:
        num_prefix = max(extent.num_prefix_tokens for extent in extents)
        num_own = max(
            extent.num_rows * extent.max_new_tokens
            + (1 if self._is_encoder_decoder else extent.num_prefix_tokens)
            for extent in extents
        )
        sequences, columns = room(len(extents), _rounded(num_own))
        beside = room(1, num_prefix)[1] if self._is_encoder_decoder else 0
        return sequences * (columns + beside) * self._bytes_per_column

    def advance(self, rows: Rows) -> Tensor:
        slots = _places(rows.sequences)
        positions = self._sight.lengths[rows.sequences]
        columns = self._sight.grow(rows.sequences, slots, rows.parents)
        self._own.reserve(self._sight.num_sequences, self._sight.num_columns, self._own.layers)
        look = self._build_look(rows.sequences, slots)
        cache: Cache = StepCache(self._own.layers, look, self._tensor(rows.sequences), self._tensor(columns))
        if self._is_encoder_decoder:
            cache = _with_prefixes(cache, self._beside.layers)
        with _attending(self._config, look):
            return self._step(self._tensor(rows.token_ids)[:, None], self._tensor(positions)[:, None], cache)

    def _build_look(self, sequences: Ids, slots: Ids) -> "Look":
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
        return self._tensor(np.where(seen, np.float32(0), _HIDDEN))[:, None, :, None]

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


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


@dataclass(frozen=True, slots=True)
class Look:
    """How the rows of one pass look at the columns, the same in all layers.

    places: [R], of the rows in a table of all sequences times `width`; None: they fill it. hidden,
    hidden_beside: what is added to scores. bias_columns: [J, C], where each column's bias by distance stands.
    """

    num_sequences: int
    width: int
    places: Tensor | None
    hidden: Tensor
    hidden_beside: Tensor
    bias_columns: Tensor

    def attend(self, query: Tensor, layer: Layer, hidden: Tensor, scaling: float) -> Tensor:
        """Attends with [R, H, K] queries to the first columns of a layer; gives [R, H, K]."""
        _, num_heads, size = query.shape
        sequences, kv_heads, columns = self.num_sequences, layer.keys.shape[1], hidden.shape[-1]
        groups = num_heads // kv_heads
        asked = self._spread(query * scaling).view(sequences, self.width, kv_heads, groups, size)
        asked = asked.transpose(1, 2).reshape(sequences, kv_heads, self.width * groups, size)
        scores = asked @ layer.keys[:sequences, :, :columns].transpose(-1, -2)  # [J, H, W * G, C]
        scores = scores.view(sequences, kv_heads, self.width, groups, columns) + hidden
        weights = scores.softmax(dim=-1).to(query.dtype).flatten(2, 3)
        read = weights @ layer.values[:sequences, :, :columns]  # [J, H, W * G, K]
        read = read.view(sequences, kv_heads, self.width, groups, size).transpose(1, 2)
        return self._gather(read.reshape(sequences * self.width, num_heads, size))

    def _spread(self, query: Tensor) -> Tensor:
        if self.places is None:
            return query
        spread = query.new_zeros(self.num_sequences * self.width, *query.shape[1:])
        return spread.index_copy_(0, self.places.to(query.device), query)

    def _gather(self, read: Tensor) -> Tensor:
        return read if self.places is None else read[self.places.to(read.device)]


class StepCache(Cache):
    """Writes the newest keys and values into their columns; has the attention function look at all there."""

    def __init__(self, layers: Sequence[Layer], look: Look, sequences: Tensor, columns: Tensor) -> None:
        super().__init__(layers=[])
        self._layers = layers
        self._num_columns = look.hidden.shape[-1]
        self._sequences = sequences
        self._columns = columns

    def get_seq_length(self, *_: object, **__: object) -> int:
        return self._num_columns - 1

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        layer = self._layers[layer_idx]
        at = self._sequences.to(key_states.device), slice(None), self._columns.to(key_states.device)
        layer.keys[at] = key_states[:, :, 0]
        layer.values[at] = value_states[:, :, 0]
        return layer.keys[:, :, : self._num_columns], layer.values[:, :, : self._num_columns]


def _with_prefixes(own: Cache, beside: Sequence[Layer]) -> EncoderDecoderCache:
    """Gives both caches of an encoder-decoder, so that it makes no keys of its prefixes anew."""
    caches = EncoderDecoderCache(own, Cache(layers=[]))
    caches.cross_attention_cache.layers = list(beside)
    caches.is_updated = dict.fromkeys(range(len(beside)), True)
    return caches


_current: ContextVar[Look | None] = ContextVar("current", default=None)


@contextmanager
def _attending(config: PreTrainedConfig, look: Look) -> Iterator[None]:
    """Has the model of a configuration attend by `_attend` inside the block, and as before behind it."""
    before, token = config._attn_implementation, _current.set(look)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _current.reset(token)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The attention function: [R, H, 1, K] queries, and keys as a cache of ours gives them."""
    look = _current.get()
    assert look is not None, "it is registered for `_attending` alone"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not getattr(module, "is_causal", True):
        hidden = look.hidden_beside
    elif position_bias is None:
        hidden = look.hidden
    else:  # [1, H, 1, C], of the distances C - 1 to 0
        hidden = look.hidden + position_bias[0, :, 0, look.bias_columns].transpose(0, 1)[:, :, None, None]
    read = look.attend(query[:, :, 0], Layer(key, value), hidden.to(query.device), scale)
    return read[:, None], None


AttentionInterface.register(NAME, _attend)
