"""The KV cache: keys and values of many sequences, in preallocated slots."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from transformers import Cache, PreTrainedModel

_CACHE_SLOT_MULTIPLE = 64  # shapes recur, and the cache seldom grows


class LayerKV(NamedTuple):
    """Keys and values of all sequences in one layer, [J, H, C, K] each, with C slots for each sequence."""

    keys: Tensor
    values: Tensor


def split_cache(cache: Cache, spans: Sequence[slice]) -> list[list[LayerKV]]:
    """Return the layers of each sequence in a cache of `transformers`: its span of tokens, [H, S, K] each."""
    return [
        [LayerKV(layer.keys[index, :, span], layer.values[index, :, span]) for layer in cache.layers]
        for index, span in enumerate(spans)
    ]


class KVCache:
    """Keys and values of all layers; sequences and slots are allocated ahead."""

    def __init__(self) -> None:
        self.layers: list[LayerKV] = []

    @property
    def shape(self) -> tuple[int, int]:
        """The allocated numbers of sequences and of slots for each."""
        if not self.layers:
            return 0, 0
        num_sequences, _, num_slots, _ = self.layers[0].keys.shape
        return num_sequences, num_slots

    @property
    def num_bytes(self) -> int:
        """The allocated bytes."""
        return sum(tensor.numel() * tensor.itemsize for layer in self.layers for tensor in layer)

    def ensure_shape(self, num_sequences: int, num_slots: int, like: Sequence[LayerKV]) -> None:
        """Grow to at least this shape, keeping the contents.

        like: tensors of the wanted types and devices, [H, S, K] each.
        """
        if not self.layers:
            self.layers = [LayerKV(*(tensor[None, :, :0] for tensor in layer)) for layer in like]
        allocated_sequences, allocated_slots = self.shape
        if num_sequences > allocated_sequences or num_slots > allocated_slots:
            self._reallocate(*padded_shape(num_sequences, num_slots))

    def shrink(self, num_sequences: int, num_slots: int, *, max_slots: int) -> None:
        """Shrink to this shape, which must hold all that is in use, where all slots exceed `max_slots`."""
        if math.prod(self.shape) > max_slots:
            self._reallocate(*padded_shape(num_sequences, num_slots))

    def write_prefix(self, sequence: int, layers: Sequence[LayerKV]) -> None:
        """Write the first slots of a sequence; layers: [H, S, K] each."""
        for own, new in zip(self.layers, layers, strict=True):
            for target, source in zip(own, new, strict=True):
                target[sequence, :, : source.shape[1]] = source
                target[sequence, :, source.shape[1] :] = 0  # the former sequence may have left NaN

    def permute(self, order: Sequence[int]) -> None:
        """Permute and drop sequences, see `DecodingState.permute`; copies only those that move."""
        assert all(new == old or old >= len(order) for new, old in enumerate(order)), "the last fill gaps"
        moves = [(new, old) for new, old in enumerate(order) if new != old]
        for tensor in (tensor for layer in self.layers for tensor in layer):
            for new, old in moves:
                tensor[new] = tensor[old]

    def _reallocate(self, num_sequences: int, num_slots: int) -> None:
        for index, layer in enumerate(self.layers):  # one by one: at most one layer exists twice
            self.layers[index] = LayerKV(*(_resized(tensor, num_sequences, num_slots) for tensor in layer))


def padded_shape(num_sequences: int, num_slots: int) -> tuple[int, int]:
    """Round up the shape of a cache: sequences to a power of two, slots to a multiple of 64."""
    return (
        1 << max(0, num_sequences - 1).bit_length(),
        -(-num_slots // _CACHE_SLOT_MULTIPLE) * _CACHE_SLOT_MULTIPLE,
    )


def kv_bytes_per_token(llm: PreTrainedModel) -> int:
    """Return the bytes of one token's keys and values in all layers of the decoder."""
    config = llm.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    num_layers: int = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    return 2 * num_layers * num_heads * head_size * llm.get_input_embeddings().weight.itemsize


def _resized(tensor: Tensor, num_sequences: int, num_slots: int) -> Tensor:
    """Copy [J, H, C, K] keys or values into a new shape, cut or filled up with zeros."""
    resized = tensor.new_zeros(num_sequences, tensor.shape[1], num_slots, tensor.shape[3])
    kept = tensor[:num_sequences, :, :num_slots]
    resized[: kept.shape[0], :, : kept.shape[2]] = kept
    return resized
