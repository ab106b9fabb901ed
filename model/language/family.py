"""Where the families of language models differ, and what all else sees of them."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

Frame = tuple[tuple[int, ...], tuple[int, ...]]  # in front of it, behind it


class DecodingState(Protocol):
    """What a language model remembers of a batch of R growing sequences."""

    def select(self, rows: Sequence[int]) -> None:
        """Makes row i a copy of the former row `rows[i]`; rows not named are forgotten."""
        ...

    def advance(self, tokens: Sequence[int]) -> Tensor:
        """Appends one token to each of the R rows; gives the [R, N] float32 logits of the next."""
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

    def prefill(self, prefixes: Sequence[Tensor]) -> tuple[Tensor, DecodingState]:
        """Reads J prefixes, embeddings of [S_j, L] each, in one pass; none depends on its neighbours.

        Gives the [J, N] float32 logits of the next token, and the state that goes on from there.
        """
        ...
