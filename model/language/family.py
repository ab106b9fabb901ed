"""Where the families of language models differ, and what all else sees of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Frame = tuple[tuple[int, ...], tuple[int, ...]]  # the special tokens in front of a prompt, and behind it
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rows:
    """What R rows of a batch grow by: the next tokens of its sequences, which have some rows each.

    sequences: [R], whose row each is, ascending. parents: [R], the former row that each goes on from, counted
    within its sequence. token_ids: [R], its newest token.
    """

    sequences: Ids
    parents: Ids
    token_ids: Ids

    def __len__(self) -> int:
        return len(self.sequences)


@dataclass(frozen=True, slots=True)
class Extent:
    """How far a sequence may grow: num_rows of max_new_tokens behind a prefix of so many tokens."""

    num_prefix_tokens: int
    num_rows: int
    max_new_tokens: int


class DecodingState(Protocol):
    """What a language model remembers of growing sequences, each of one prefix and some rows.

    Sequences are counted from 0 in the order they came in.
    """

    def admit(self, prefixes: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
        """Reads J prefixes, embeddings of [S_j, L] each, in one pass; none depends on its neighbours.

        widths: the number of rows that each will grow, at most. Gives the [J, N] logits of the next token;
        each sequence has then one row.
        """
        ...

    def advance(self, rows: Rows) -> Tensor:
        """Appends one token to each of R rows; gives the [R, N] logits of the next."""
        ...

    def retain(self, order: Sequence[int]) -> None:
        """Makes sequence i what `order[i]` was; those not named are forgotten."""
        ...

    def num_bytes(self, extents: Sequence[Extent]) -> int:
        """Gives the most that the keys and values of such sequences together may take."""
        ...


class Family(Protocol):
    """A way to read soft tokens and a prompt, and to go on from there."""

    @property
    def question_template(self) -> str:
        """The prompt that questions are answered best in, with one `{}` for the question."""
        ...

    @property
    def max_positions(self) -> int:
        """How many tokens, image tokens included, one sequence can hold."""
        ...

    @property
    def frame(self) -> Frame:
        """The special tokens around a prompt."""
        ...

    def answer_context(self, prefix_ids: Sequence[int], /) -> tuple[int, ...]:
        """Gives the ids in front of an answer in the sequence it is part of.

        prefix_ids: the prompt's, behind those that stand for soft tokens.
        """
        ...

    def check_length(self, *, num_prompt_tokens: int, num_soft_tokens: int, max_new_tokens: int) -> None:
        """Raises InvalidPromptError or InvalidParamsError where a sequence would exceed the positions."""
        ...

    def build_state(self) -> DecodingState:
        """Gives a state that remembers nothing yet."""
        ...
