"""Where the families of language models differ, and what all else sees of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor
from transformers import Cache

from model.language.kv_cache import Ids, Layer

Frame = tuple[tuple[int, ...], tuple[int, ...]]  # the special tokens in front of a prompt, and behind it


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

    def admit(self, prefixes: Sequence[Tensor], extents: Sequence[Extent]) -> Tensor:
        """Reads J prefixes, embeddings of [S_j, L] each, in one pass; none depends on its neighbours.

        extents: how far each will grow, at most. Gives the [J, N] logits of the next token; each sequence
        has then one row.
        """
        ...

    def advance(self, rows: Rows) -> Tensor:
        """Appends one token to each of R rows; gives the [R, N] logits of the next."""
        ...

    def retain(self, order: Sequence[int]) -> None:
        """Makes sequence i what `order[i]` was: i itself, or one beyond the new number of sequences.

        Those not named are forgotten.
        """
        ...

    def num_bytes(self, extents: Sequence[Extent]) -> int:
        """Gives the most that the keys and values of such sequences together may take.

        What is read at `admit` is there once more until it is put in its place.
        """
        ...


class Reading(NamedTuple):
    """What a family makes of J prefixes that were read together.

    logits: [J, N], of the next token. own: for each sequence the layers that its rows go on from. beside:
    those that they look at beside (an encoder-decoder's prefix), or None.
    """

    logits: Tensor
    own: Sequence[Sequence[Layer]]
    beside: Sequence[Sequence[Layer]] | None = None


class Batch(Protocol):
    """Sequences on a cache of `transformers`' own that were read together, a row for each at first."""

    def select(self, rows: Sequence[int]) -> None:
        """Makes row i a copy of the former row `rows[i]`; rows not named are forgotten."""
        ...

    def advance(self, tokens: Sequence[int]) -> Tensor:
        """Appends one token to each of the R rows; gives the [R, N] logits of the next."""
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

    def prefill(self, prefixes: Sequence[Tensor]) -> tuple[Tensor, Batch]:
        """Reads J prefixes, [S_j, L] each; gives the [J, N] logits of the next token, and what goes on."""
        ...

    def read(self, prefixes: Sequence[Tensor]) -> Reading:
        """Does the same for a state that keeps keys and values itself."""
        ...

    def step(self, input_ids: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Gives the [R, N] logits behind [R, 1] ids at [R, 1] positions; the cache knows what each sees."""
        ...
