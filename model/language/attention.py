"""How a pass of a language model looks at columns: its cache and its attention function.

Both are `transformers`' own seams: a `Cache` takes each layer's keys and values in, and an attention
function, registered by name, looks at them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import AttentionInterface, Cache, EncoderDecoderCache, PreTrainedConfig

from model.language.kv_cache import Layer

NAME = "shared_prefix"


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


def with_prefixes(own: Cache, beside: Sequence[Layer]) -> EncoderDecoderCache:
    """Gives both caches of an encoder-decoder, so that it makes no keys of its prefixes anew."""
    caches = EncoderDecoderCache(own, Cache(layers=[]))
    caches.cross_attention_cache.layers = list(beside)
    caches.is_updated = dict.fromkeys(range(len(beside)), True)
    return caches


_current: ContextVar[Look | None] = ContextVar("current", default=None)


@contextmanager
def attending(config: PreTrainedConfig, look: Look) -> Iterator[None]:
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
    assert look is not None, "it is registered for `attending` alone"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    is_beside = look.hidden_beside.shape[-1] and not module.is_causal  # an encoder-decoder, at its prefixes
    hidden = (look.hidden_beside if is_beside else look.hidden).to(query.device)
    if position_bias is not None and not is_beside:  # [1, H, 1, C], of the distances C - 1 to 0
        bias = position_bias[0, :, 0, look.bias_columns.to(query.device)]  # [H, J, C]
        hidden = hidden + bias.transpose(0, 1)[:, :, None, None]
    read = look.attend(query[:, :, 0], Layer(key, value), hidden, scale)
    return read[:, None], None


AttentionInterface.register(NAME, _attend)
