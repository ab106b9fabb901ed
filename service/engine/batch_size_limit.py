"""The size of batches, learned from the time they take and from the device's memory."""

import math
from typing import Final

_PATIENCE: Final = 32  # full batches before a larger one is tried
_MAX_PATIENCE: Final = 16384


class BatchSizeLimit:
    """How many items go to the device at once: as many as `max_seconds` and its memory allow, at least one.

    After running out of memory the limit is what is known to fit, or half. After 32 full batches it grows by
    half; each growth that fails doubles the number of batches before the next.
    """

    def __init__(self, most: int, *, max_seconds: float = math.inf) -> None:
        self._most = most
        self._max_seconds = max_seconds
        self._fits_in_time = most
        self._fits_in_memory = most  # as far as is known
        self._proven = 0  # the largest batch that succeeded
        self._num_successes = 0
        self._patience = _PATIENCE
        self._has_grown = False  # since memory ran out last

    @property
    def limit(self) -> int:
        return min(self._fits_in_time, self._fits_in_memory)

    def observe_success(self, count: int, seconds: float, *, is_cut: bool) -> None:
        """Learn from a batch. is_cut: it would have been larger without the limit."""
        self._proven = max(self._proven, count)
        if seconds > self._max_seconds:
            self._fits_in_time = max(1, int(count * self._max_seconds / seconds))
        elif is_cut:
            self._fits_in_time = min(self._most, max(self._fits_in_time, count + 1))
        if is_cut and self._fits_in_memory < self._most:
            self._num_successes += 1
        if self._num_successes >= self._patience:
            self._fits_in_memory = min(self._most, self._fits_in_memory + max(1, self._fits_in_memory // 2))
            self._num_successes = 0
            self._has_grown = True

    def observe_out_of_memory(self, count: int) -> None:
        """Learn that the device's memory does not hold a batch of this size."""
        known = self._proven if self._proven < count else 0
        self._fits_in_memory = max(known, count // 2, 1)
        self._proven = min(self._proven, self._fits_in_memory)
        if self._has_grown:
            self._patience = min(_MAX_PATIENCE, 2 * self._patience)
        self._has_grown = False
        self._num_successes = 0
