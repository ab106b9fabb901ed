"""Attention of one decode step over the slots of the KV cache.

Both classes use extension points of `transformers`: a `Cache` receives the keys and values of each layer,
and an attention function, registered by name, attends to them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import AttentionInterface, Cache, EncoderDecoderCache, PreTrainedConfig

from model.language.kv_cache import LayerKV

NAME = "shared_prefix"


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """The attention of one decode step, the same in all layers.

    beam_width: W. row_index: [R], of each row among the J * W beams; None where the rows are all of them.
    attention_bias, cross_attention_bias: [J, 1, W, 1, C], added to the scores. position_bias_index: [J, C],
    where the relative position bias of each slot stands.
    """

    num_sequences: int
    beam_width: int
    row_index: Tensor | None
    attention_bias: Tensor
    cross_attention_bias: Tensor
    position_bias_index: Tensor

    def attend(self, query: Tensor, layer: LayerKV, bias: Tensor, scaling: float) -> Tensor:
        """Attend with [R, H, K] queries to the first slots of a layer; return [R, H, K].

        The beams of a sequence are the queries of one product, so its keys are read once for all of them.
        """
        _, num_heads, head_size = query.shape
        num_sequences, num_kv_heads, num_slots = self.num_sequences, layer.keys.shape[1], bias.shape[-1]
        groups = num_heads // num_kv_heads
        queries = self._scatter(query * scaling)
        queries = queries.view(num_sequences, self.beam_width, num_kv_heads, groups, head_size)
        queries = queries.transpose(1, 2).reshape(
            num_sequences, num_kv_heads, self.beam_width * groups, head_size
        )
        scores = queries @ layer.keys[:num_sequences, :, :num_slots].transpose(-1, -2)  # [J, H, W * G, C]
        scores = scores.view(num_sequences, num_kv_heads, self.beam_width, groups, num_slots) + bias
        weights = scores.softmax(dim=-1).to(query.dtype).flatten(2, 3)
        output = weights @ layer.values[:num_sequences, :, :num_slots]  # [J, H, W * G, K]
        output = output.view(num_sequences, num_kv_heads, self.beam_width, groups, head_size).transpose(1, 2)
        return self._gather(output.reshape(num_sequences * self.beam_width, num_heads, head_size))

    def _scatter(self, query: Tensor) -> Tensor:
        if self.row_index is None:
            return query
        scattered = query.new_zeros(self.num_sequences * self.beam_width, *query.shape[1:])
        return scattered.index_copy_(0, self.row_index.to(query.device), query)

    def _gather(self, output: Tensor) -> Tensor:
        return output if self.row_index is None else output[self.row_index.to(output.device)]


class SlotCache(Cache):
    """A cache of `transformers` that writes each row's newest key and value into its slot.

    It returns all slots of the sequences, for our attention function to attend to.
    """

    def __init__(
        self, layers: Sequence[LayerKV], metadata: AttentionMetadata, sequences: Tensor, slots: Tensor
    ) -> None:
        super().__init__(layers=[])
        self._layers = layers
        self._num_slots = metadata.attention_bias.shape[-1]
        self._sequences = sequences
        self._slots = slots

    def get_seq_length(self, *_: object, **__: object) -> int:
        return self._num_slots - 1

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        layer = self._layers[layer_idx]
        index = self._sequences.to(key_states.device), slice(None), self._slots.to(key_states.device)
        layer.keys[index] = key_states[:, :, 0]
        layer.values[index] = value_states[:, :, 0]
        return layer.keys[:, :, : self._num_slots], layer.values[:, :, : self._num_slots]


def build_encoder_decoder_cache(
    self_attention: Cache, cross_attention: Sequence[LayerKV]
) -> EncoderDecoderCache:
    """Build the cache of an encoder-decoder, so that it computes no keys of its prefixes again."""
    cache = EncoderDecoderCache(self_attention, Cache(layers=[]))
    cache.cross_attention_cache.layers = list(cross_attention)
    cache.is_updated = dict.fromkeys(range(len(cross_attention)), True)
    return cache


_current: ContextVar[AttentionMetadata | None] = ContextVar("current", default=None)


@contextmanager
def use_attention(config: PreTrainedConfig, metadata: AttentionMetadata) -> Iterator[None]:
    """Swap in our attention function for the model of a configuration, inside the block."""
    former, token = config._attn_implementation, _current.set(metadata)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = former
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
    """Attend with [R, H, 1, K] queries to the keys and values that `SlotCache` returns."""
    metadata = _current.get()
    assert metadata is not None, "registered for `use_attention` alone"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    is_cross_attention = metadata.cross_attention_bias.shape[-1] and not module.is_causal
    bias = metadata.cross_attention_bias if is_cross_attention else metadata.attention_bias
    bias = bias.to(query.device)
    if position_bias is not None and not is_cross_attention:  # [1, H, 1, C], of the distances C - 1 to 0
        index = metadata.position_bias_index.to(query.device)
        bias = bias + position_bias[0, :, 0, index].transpose(0, 1)[:, :, None, None]  # [J, H, 1, 1, C]
    output = metadata.attend(query[:, :, 0], LayerKV(key, value), bias, scale)
    return output[:, None], None


AttentionInterface.register(NAME, _attend)
