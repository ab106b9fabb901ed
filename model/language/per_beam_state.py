"""The fallback: a decoding state with a cache row for every beam, on `transformers`' own caches.

Sequences of one prefill are decoded together. Any model that `transformers` can generate with fits.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from model.devices import upload
from model.language.decoding_state import DecodeInput, IntArray, MemoryRequirement
from model.language.kv_cache import kv_bytes_per_token
from model.language.model_family import ModelFamily, PrefilledBatch


def per_beam_kv_bytes(llm: PreTrainedModel, requirements: Sequence[MemoryRequirement]) -> int:
    """Return the most bytes that a `PerBeamState` of such sequences allocates."""
    num_rows = sum(one.num_rows for one in requirements)
    max_prefix = max(one.num_prefix_tokens for one in requirements)  # a batch is padded to it
    max_new = max(one.max_new_tokens for one in requirements)
    return num_rows * (max_prefix + max_new) * kv_bytes_per_token(llm)


class BatchMember:
    """A prefilled batch and the sequence of each of its rows. The rows of a sequence are adjacent."""

    def __init__(self, batch: PrefilledBatch, sequences: IntArray) -> None:
        self.batch = batch
        self.sequences = sequences

    def decode_step(self, inputs: DecodeInput) -> Tensor:
        """Append one token to the rows of its own sequences."""
        order = np.argsort(self.sequences, kind="stable")
        first_rows = order[np.searchsorted(self.sequences[order], inputs.sequences)]
        self.batch.reorder((first_rows + inputs.parents).tolist())
        self.sequences = inputs.sequences
        return self.batch.decode_step(inputs.token_ids.tolist())


class PerBeamState:
    """See `model.language.decoding_state.DecodingState`."""

    def __init__(self, model_family: ModelFamily) -> None:
        self._model_family = model_family
        self._members: list[BatchMember] = []
        self._num_sequences = 0

    def prefill(self, prefixes: Sequence[Tensor], requirements: Sequence[MemoryRequirement]) -> Tensor:
        del requirements  # rows are allocated when they are decoded
        logits, batch = self._model_family.prefill_batch(prefixes)
        self._members.append(BatchMember(batch, self._num_sequences + np.arange(len(prefixes))))
        self._num_sequences += len(prefixes)
        return logits

    def decode_step(self, inputs: DecodeInput) -> Tensor:
        logits: list[Tensor] = []
        row_indices: list[IntArray] = []
        for member in self._members:
            (rows,) = np.isin(inputs.sequences, member.sequences).nonzero()
            member_inputs = DecodeInput(inputs.sequences[rows], inputs.parents[rows], inputs.token_ids[rows])
            logits.append(member.decode_step(member_inputs))
            row_indices.append(rows)
        order = upload(np.argsort(np.concatenate(row_indices)), logits[0].device)
        return torch.cat(logits)[order]

    def permute(self, order: Sequence[int]) -> None:
        new_indices = np.full(self._num_sequences + 1, -1)  # the last entry keeps -1, of those dropped before
        new_indices[np.array(order, dtype=np.int64)] = np.arange(len(order))
        for member in self._members:  # rows of dropped sequences leave with the next step
            member.sequences = new_indices[member.sequences]
        self._members = [member for member in self._members if (member.sequences >= 0).any()]
        self._num_sequences = len(order)
