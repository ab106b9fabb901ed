"""The plain way to remember growing texts: batches on `transformers`' own caches, a row for every beam.

Sequences that were read together advance together. It asks nothing of a model but that it generates.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from model.language.family import Growth


class Batch(Protocol):
    """Sequences that were read together, a row for each at first."""

    def select(self, rows: Sequence[int]) -> None:
        """Makes row i a copy of the former row `rows[i]`; rows not named are forgotten."""
        ...

    def advance(self, tokens: Sequence[int]) -> Tensor:
        """Appends one token to each of the R rows; gives the [R, N] float32 logits of the next."""
        ...


Prefill = Callable[[Sequence[Tensor]], tuple[Tensor, Batch]]


class Member:
    """A batch, its sequences in order, and how many rows each has."""

    def __init__(self, batch: Batch, keys: Sequence[Hashable]) -> None:
        self.batch = batch
        self.num_rows = dict.fromkeys(keys, 1)

    def advance(self, growths: Sequence[Growth]) -> dict[Hashable, Tensor]:
        first_row: dict[Hashable, int] = {}
        at = 0
        for key, count in self.num_rows.items():
            first_row[key] = at
            at += count
        self.batch.select([first_row[growth.key] + parent for growth in growths for parent in growth.parents])
        logits = self.batch.advance([token for growth in growths for token in growth.tokens])
        self.num_rows = {growth.key: len(growth.tokens) for growth in growths}
        return dict(zip(self.num_rows, torch.split(logits, list(self.num_rows.values())), strict=True))


class PlainState:
    """See `model.language.family.DecodingState`. prefill: reads prefixes into a batch of their own."""

    def __init__(self, prefill: Prefill) -> None:
        self._prefill = prefill
        self._members: list[Member] = []

    def admit(self, keys: Sequence[Hashable], prefixes: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
        del widths  # a batch grows rows as they come
        logits, batch = self._prefill(prefixes)
        self._members.append(Member(batch, keys))
        return logits

    def advance(self, growths: Sequence[Growth]) -> list[Tensor]:
        logits: dict[Hashable, Tensor] = {}
        for member in self._members:
            of_member = [growth for growth in growths if growth.key in member.num_rows]
            if of_member:
                logits |= member.advance(of_member)
        self._members = [member for member in self._members if member.num_rows.keys() & logits.keys()]
        return [logits[growth.key] for growth in growths]
