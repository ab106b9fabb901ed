"""Finds the one that makes a batch fail, by halves."""

from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Suspects(Generic[T]):
    """Those of a failed batch, in groups that are to be tried one by one before anything else."""

    def __init__(self) -> None:
        self._groups: deque[tuple[T, ...]] = deque()

    def __bool__(self) -> bool:
        return bool(self._groups)

    def clear(self) -> None:
        """Forgets them all."""
        self._groups.clear()

    def accuse(self, batch: Sequence[T]) -> T | None:
        """After a batch failed: gives the culprit if it was alone, else has each half tried by itself."""
        if len(batch) == 1:
            return batch[0]
        middle = len(batch) // 2
        self._groups.extendleft((tuple(batch[middle:]), tuple(batch[:middle])))
        return None

    def next_group(self) -> tuple[T, ...]:
        """Takes the group to be tried next; to be called where there is one."""
        return self._groups.popleft()
