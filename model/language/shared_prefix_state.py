"""A decoding state whose beams share the keys and values that they have in common.

A sequence has one row of slots in each layer, [H, C, K]: its prefix, then one slot for each token that any of
its beams took. A slot table says which beam attends to which slot, the same in all layers. Reordering beams
changes the table alone, and a slot that no beam attends to is written again.
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
from model.language.attention import (
    AttentionMetadata,
    SlotCache,
    build_encoder_decoder_cache,
    use_attention,
)
from model.language.decoding_state import DecodeInput, IntArray, MemoryRequirement
from model.language.kv_cache import KVCache, LayerKV, kv_bytes_per_token, padded_shape
from model.language.model_family import ModelFamily
from model.language.slot_table import SlotTable

_MASKED = torch.finfo(torch.float32).min  # not -inf: an inactive beam attends to nothing at all


def unsupported_reason(llm: PreTrainedModel) -> str | None:
    """Return why a model cannot use `SharedPrefixState`, or None where it can.

    It must attend by `transformers`' attention interface alone, in all layers to all tokens.
    """
    config = llm.config
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config.is_encoder_decoder and config.model_type not in ("t5", "mt5"):
        return f"it is an encoder-decoder of type {config.model_type!r}"
    if not (llm._supports_attention_backend or config.is_encoder_decoder):
        return "it does not use transformers' attention interface"
    if layer_types != {"full_attention"} or getattr(config, "sliding_window", None):
        return "it uses sliding-window attention"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps its attention scores"
    if any(name.endswith("sinks") for name, _ in llm.named_parameters()):
        return "it has attention sinks"
    return None


def shared_prefix_kv_bytes(llm: PreTrainedModel, requirements: Sequence[MemoryRequirement]) -> int:
    """Return the most bytes that a `SharedPrefixState` of such sequences allocates.

    Not counted: the second copy of keys and values that exists during a prefill.
    """
    shapes = _max_shapes(requirements, is_encoder_decoder=llm.config.is_encoder_decoder)
    return sum(map(math.prod, shapes)) * kv_bytes_per_token(llm)


class SharedPrefixState:
    """See `model.language.decoding_state.DecodingState`."""

    def __init__(self, llm: PreTrainedModel, model_family: ModelFamily) -> None:
        self._config = llm.get_decoder().config
        self._device: torch.device = llm.get_input_embeddings().weight.device
        self._is_encoder_decoder: bool = llm.config.is_encoder_decoder
        self._model_family = model_family
        self._self_attention = KVCache()
        self._slot_table = SlotTable()
        self._cross_attention = KVCache()
        self._requirements: list[MemoryRequirement] = []

    @property
    def num_bytes(self) -> int:
        """The allocated bytes of keys and values."""
        return self._self_attention.num_bytes + self._cross_attention.num_bytes

    @property
    def num_used_slots(self) -> int:
        """The slots of self-attention that some beam attends to."""
        return self._slot_table.num_used_slots

    @property
    def _encoder_lengths(self) -> IntArray:
        """The tokens of the encoded prefixes, [J]; 0 without an encoder."""
        return np.array(
            [one.num_prefix_tokens * self._is_encoder_decoder for one in self._requirements], np.int64
        )

    def prefill(self, prefixes: Sequence[Tensor], requirements: Sequence[MemoryRequirement]) -> Tensor:
        self._requirements += requirements
        self._shrink()
        output = self._model_family.prefill(prefixes)
        first = len(self._slot_table.lengths)
        for layers, requirement in zip(output.self_attention, requirements, strict=True):
            self._slot_table.append(layers[0].keys.shape[1], requirement.num_rows)
        self._self_attention.ensure_shape(*self._slot_table.shape, output.self_attention[0])
        for sequence, layers in enumerate(output.self_attention, start=first):
            self._self_attention.write_prefix(sequence, layers)
        if output.cross_attention is not None:
            self._write_encoded(first, output.cross_attention)
        return output.logits

    def _shrink(self) -> None:
        """Free what former sequences needed and the present ones do not."""
        max_self, max_cross = _max_shapes(self._requirements, is_encoder_decoder=self._is_encoder_decoder)
        self._self_attention.shrink(*self._slot_table.shape, max_slots=math.prod(max_self))
        lengths = self._encoder_lengths
        self._cross_attention.shrink(len(lengths), lengths.max(initial=0), max_slots=math.prod(max_cross))

    def _write_encoded(self, first: int, sequences: Sequence[Sequence[LayerKV]]) -> None:
        lengths = self._encoder_lengths
        self._cross_attention.ensure_shape(len(lengths), lengths.max(), sequences[0])
        for sequence, layers in enumerate(sequences, start=first):
            self._cross_attention.write_prefix(sequence, layers)

    def permute(self, order: Sequence[int]) -> None:
        self._requirements = [self._requirements[index] for index in order]
        self._self_attention.permute(order)
        self._slot_table.permute(order)
        self._cross_attention.permute(order)

    def decode_step(self, inputs: DecodeInput) -> Tensor:
        beams = _count_within_runs(inputs.sequences)
        positions = self._slot_table.lengths[inputs.sequences]
        slots = self._slot_table.allocate(inputs.sequences, beams, inputs.parents)
        self._self_attention.ensure_shape(*self._slot_table.shape, self._self_attention.layers)
        metadata = self._build_metadata(inputs.sequences, beams)
        cache: Cache = SlotCache(
            self._self_attention.layers, metadata, self._upload(inputs.sequences), self._upload(slots)
        )
        if self._is_encoder_decoder:
            cache = build_encoder_decoder_cache(cache, self._cross_attention.layers)
        with use_attention(self._config, metadata):
            return self._model_family.decode_step(
                self._upload(inputs.token_ids)[:, None], self._upload(positions)[:, None], cache
            )

    def _build_metadata(self, sequences: IntArray, beams: IntArray) -> AttentionMetadata:
        mask = self._slot_table.mask
        num_sequences, beam_width, num_slots = mask.shape
        has_all_beams = len(beams) == num_sequences * beam_width
        distances = self._slot_table.lengths[:, None] - 1 - self._slot_table.positions  # [J, C]
        lengths = self._encoder_lengths
        encoder_mask = np.arange(int(lengths.max(initial=0))) < lengths[:, None]
        return AttentionMetadata(
            num_sequences=num_sequences,
            beam_width=beam_width,
            row_index=None if has_all_beams else self._upload(sequences * beam_width + beams),
            attention_bias=self._build_bias(mask),
            cross_attention_bias=self._build_bias(encoder_mask[:, None]),
            position_bias_index=self._upload(num_slots - 1 - distances.clip(0, num_slots - 1)),
        )

    def _build_bias(self, mask: NDArray[np.bool_]) -> Tensor:
        """Turn a [J, W, C] mask into the [J, 1, W, 1, C] bias of the scores."""
        return self._upload(np.where(mask, np.float32(0), np.float32(_MASKED)))[:, None, :, None]

    def _upload(self, array: NDArray[Any]) -> Tensor:
        return upload(array, self._device)


def _max_shapes(
    requirements: Sequence[MemoryRequirement], *, is_encoder_decoder: bool
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the largest shapes of the caches of self-attention and cross-attention."""
    max_prefix = max(one.num_prefix_tokens for one in requirements)
    num_new = [one.num_rows * one.max_new_tokens for one in requirements]
    if is_encoder_decoder:
        return padded_shape(len(requirements), 1 + max(num_new)), padded_shape(len(requirements), max_prefix)
    totals = (one.num_prefix_tokens + new for one, new in zip(requirements, num_new, strict=True))
    return padded_shape(len(requirements), max(totals)), (0, 0)


def _count_within_runs(sequences: IntArray) -> IntArray:
    """Count the rows within each sequence: [0, 0, 0, 1, 1] becomes [0, 1, 2, 0, 1]."""
    return np.arange(len(sequences)) - np.searchsorted(sequences, sequences)
