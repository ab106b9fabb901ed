"""The interface of model families: decoder-only and encoder-decoder language models."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor
from transformers import Cache

from model.language.kv_cache import LayerKV


class SpecialTokenTemplate(NamedTuple):
    """The special tokens in front of a prompt and behind it."""

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]


class PrefillOutput(NamedTuple):
    """The result of one prefill over J prefixes.

    logits: [J, N], of the next token. self_attention: for each sequence, the layers that its beams extend.
    cross_attention: for each sequence, the layers of its encoded prefix; None without an encoder.
    """

    logits: Tensor
    self_attention: Sequence[Sequence[LayerKV]]
    cross_attention: Sequence[Sequence[LayerKV]] | None = None


class PrefilledBatch(Protocol):
    """Sequences of one prefill on a cache of `transformers`, with one row each at first."""

    def reorder(self, rows: Sequence[int]) -> None:
        """Make row i a copy of the former row `rows[i]`; rows not named are dropped."""
        ...

    def decode_step(self, token_ids: Sequence[int]) -> Tensor:
        """Append one token to each of R rows and return the [R, N] logits of the next."""
        ...


class ModelFamily(Protocol):
    """Prefill and decode steps of one kind of language model."""

    @property
    def question_template(self) -> str:
        """The prompt in which questions are answered best, with one `{}` for the question."""
        ...

    @property
    def max_positions(self) -> int:
        """The most tokens of one sequence, image tokens included."""
        ...

    @property
    def special_tokens(self) -> SpecialTokenTemplate:
        """The special tokens around a prompt."""
        ...

    def answer_context(self, prefix_ids: Sequence[int], /) -> tuple[int, ...]:
        """Return the ids in front of an answer, in the sequence that the answer is part of.

        prefix_ids: the ids that stand for image tokens, then those of the prompt.
        """
        ...

    def check_length(self, *, num_prompt_tokens: int, num_soft_tokens: int, max_new_tokens: int) -> None:
        """Raise InvalidPromptError or InvalidParamsError where a sequence may exceed the positions."""
        ...

    def prefill_batch(self, prefixes: Sequence[Tensor]) -> tuple[Tensor, PrefilledBatch]:
        """Compute J prefixes, [S_j, L] each; return the [J, N] logits of the next token and the batch."""
        ...

    def prefill(self, prefixes: Sequence[Tensor]) -> PrefillOutput:
        """Compute J prefixes, [S_j, L] each, for a state that holds keys and values itself."""
        ...

    def decode_step(self, input_ids: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Return the [R, N] logits of the tokens after [R, 1] ids at [R, 1] positions.

        cache: masks what each row must not attend to, so no attention mask is passed.
        """
        ...
