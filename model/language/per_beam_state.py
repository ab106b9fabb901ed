"""The plain way to remember growing texts: batches on `transformers`' own caches, a row for every beam.

Sequences that were read together advance together. It asks nothing of a model but that it generates.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from model.devices import upload
from model.language.kv_cache import Ids
from model.language.model_family import Batch, Extent, Family, Rows
from model.language.shared_prefix_state import bytes_per_token


class Member:
    """A batch, and the sequence that each of its rows belongs to. A sequence's rows lie side by side."""

    def __init__(self, batch: Batch, sequences: Ids) -> None:
        self.batch = batch
        self.sequences = sequences

    def advance(self, rows: Rows) -> Tensor:
        """Takes the rows of its own sequences."""
        order = np.argsort(self.sequences, kind="stable")
        firsts = order[np.searchsorted(self.sequences[order], rows.sequences)]
        self.batch.select((firsts + rows.parents).tolist())
        self.sequences = rows.sequences
        return self.batch.advance(rows.token_ids.tolist())


class PlainState:
    """See `model.language.family.DecodingState`."""

    def __init__(self, llm: PreTrainedModel, family: Family) -> None:
        self._bytes_per_token = bytes_per_token(llm)
        self._family = family
        self._members: list[Member] = []
        self._num_sequences = 0

    def admit(self, prefixes: Sequence[Tensor], extents: Sequence[Extent]) -> Tensor:
        del extents  # a batch grows rows as they come
        logits, batch = self._family.prefill(prefixes)
        self._members.append(Member(batch, self._num_sequences + np.arange(len(prefixes))))
        self._num_sequences += len(prefixes)
        return logits

    def advance(self, rows: Rows) -> Tensor:
        logits: list[Tensor] = []
        places: list[Ids] = []
        for member in self._members:
            (at,) = np.isin(rows.sequences, member.sequences).nonzero()
            logits.append(member.advance(Rows(rows.sequences[at], rows.parents[at], rows.token_ids[at])))
            places.append(at)
        order = upload(np.argsort(np.concatenate(places)), logits[0].device)
        return torch.cat(logits)[order]

    def retain(self, order: Sequence[int]) -> None:
        numbers = np.full(self._num_sequences + 1, -1)  # the last one: what was forgotten before stays so
        numbers[np.array(order, dtype=np.int64)] = np.arange(len(order))
        for member in self._members:  # rows of those forgotten leave with the next step
            member.sequences = numbers[member.sequences]
        self._members = [member for member in self._members if (member.sequences >= 0).any()]
        self._num_sequences = len(order)

    def num_bytes(self, extents: Sequence[Extent]) -> int:
        rows = sum(extent.num_rows for extent in extents)
        prefix = max(extent.num_prefix_tokens for extent in extents)  # to which a batch is padded
        new = max(extent.max_new_tokens for extent in extents)
        return rows * (prefix + new) * self._bytes_per_token
