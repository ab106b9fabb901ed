"""Figures of several repeats."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """What the repeats gave."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f}, {self.most:.2f})"


def spread_of(values: Iterable[float]) -> Spread:
    """There must be one at least."""
    listed = list(values)
    return Spread(statistics.median(listed), min(listed), max(listed))


def median_of(values: Iterable[float | None]) -> float | None:
    """Gives the median of those that are there; None where none is."""
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None
