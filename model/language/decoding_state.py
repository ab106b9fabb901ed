"""The interface between decoder and language model: sequences that are decoded together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class MemoryRequirement:
    """The most tokens that one sequence may need: a prefix, and `max_new_tokens` for each of its rows.

    num_prefix_tokens: image tokens and prompt. num_rows: beams or samples.
    """

    num_prefix_tokens: int
    num_rows: int
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class DecodeInput:
    """The newest token of each of R rows. The rows of one sequence are its beams.

    sequences: [R], ascending. parents: [R], the beam of the last step that each row continues, counted
    within its sequence. token_ids: [R].
    """

    sequences: IntArray
    parents: IntArray
    token_ids: IntArray

    def __len__(self) -> int:
        return len(self.sequences)


class DecodingState(Protocol):
    """The keys and values of sequences, each of one prefix and some beams.

    Sequences are counted from 0 in the order of their prefill.
    """

    def prefill(self, prefixes: Sequence[Tensor], requirements: Sequence[MemoryRequirement]) -> Tensor:
        """Compute J prefixes, embeddings of [S_j, L] each, in one pass; none depends on the others.

        requirements: the most memory that each will need. Returns the [J, N] logits of the next token. Each
        sequence has one row until its first decode step.
        """
        ...

    def decode_step(self, inputs: DecodeInput) -> Tensor:
        """Append one token to each of R rows and return the [R, N] logits of the next."""
        ...

    def permute(self, order: Sequence[int]) -> None:
        """Permute and drop sequences: sequence i becomes what `order[i]` was.

        `order[i]` is i itself, or at least `len(order)`. Sequences not in `order` are dropped.
        """
        ...
