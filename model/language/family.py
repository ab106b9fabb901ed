"""Where the families of language models differ, and what all else sees of them."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Frame = tuple[tuple[int, ...], tuple[int, ...]]  # the special tokens in front of a prompt, and behind it


@dataclass(frozen=True, slots=True)
class Growth:
    """What a sequence of a batch, `key`, grows by: rows that go on from those of the last step.

    parents: the former row that each goes on from, counted within the sequence. tokens: its newest token.
    """

    key: Hashable
    parents: Sequence[int]
    tokens: Sequence[int]


class DecodingState(Protocol):
    """What a language model remembers of growing sequences, each of one prefix and some rows."""

    def admit(self, keys: Sequence[Hashable], prefixes: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
        """Reads J prefixes, embeddings of [S_j, L] each, in one pass; none depends on its neighbours.

        widths: the number of rows that each will grow, at most. Gives the [J, N] float32 logits of the next
        token; each sequence has then one row.
        """
        ...

    def advance(self, growths: Sequence[Growth]) -> list[Tensor]:
        """Appends one token to each row; gives the [w, N] float32 logits of the next for each sequence.

        Sequences that are not named are forgotten.
        """
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
