"""Evaluations of a run on validation data: when they are due, which was the best, and when to stop."""

from collections.abc import Callable
from dataclasses import dataclass

from training.metrics_log import MetricsLog


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Measures a model every so many steps.

    measure: returns figures by name. best_by: the figure whose highest value marks the best checkpoint.
    patience: how many evaluations in a row may bring no better one before the run ends; None: any number.
    """

    measure: Callable[[], dict[str, float]]
    every: int
    best_by: str
    patience: int | None = None


class EvaluationHistory:
    """The evaluations of one run so far, which are in its log and survive a kill with it."""

    def __init__(self, evaluation: Evaluation, log: MetricsLog) -> None:
        self._evaluation = evaluation
        self._log = log

    @property
    def is_ended(self) -> bool:
        """Whether the last evaluations, as many as the patience, brought no better one."""
        values = self._values()
        patience = self._evaluation.patience
        return (
            patience is not None and bool(values) and len(values) - 1 - values.index(max(values)) >= patience
        )

    def is_due(self, num_updates: int) -> bool:
        return num_updates % self._evaluation.every == 0

    def evaluate(self, num_updates: int) -> bool:
        """Measure the model, log the figures, and return whether it is better than ever before."""
        former = self._values()
        figures = self._evaluation.measure()
        self._log.append(num_updates, figures)
        self._log.plot()
        return not former or figures[self._evaluation.best_by] > max(former)

    def _values(self) -> list[float]:
        return [row[self._evaluation.best_by] for row in self._log.rows]
