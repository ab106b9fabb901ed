"""What all ways of searching for an answer share.

One step of a search has two halves. `propose` runs on the device and launches work only; `accept` runs on
the host, on what came over in the one transfer of the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Scores = NDArray[np.float32]
TokenIds = NDArray[np.int64]


class Continuation(NamedTuple):
    """A sequence that goes on: the row it grew from, counted within the job, and its newest token."""

    parent: int
    token_id: int


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """An answer, whole or growing. score: its log-probability, length-penalised once it is whole."""

    token_ids: tuple[int, ...] = ()
    score: float = 0.0

    def extended(self, token_id: int, score: float) -> "Hypothesis":
        return Hypothesis((*self.token_ids, token_id), score)


class Search(Protocol):
    """The state of one job between steps."""

    def propose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Gives scores and ids, [R, k] each, of the tokens that may continue the job's R rows.

        logits: [R, N] float32; a single row in the first step, which all sequences start from.
        """
        ...

    def accept(self, scores: Scores, token_ids: TokenIds) -> Sequence[Continuation]:
        """Takes the proposal in; gives the rows of the next step, none once the job is done."""
        ...

    def answers(self) -> Sequence[Hypothesis]:
        """Gives the answers of a job that is done, the best first."""
        ...
