"""How many go to the device at once: no more than a turn has time for, nor than its memory has held."""

import math

TURN_S = 0.5  # of a piece of work at most, about: nobody waits much longer for the device
_PATIENCE, _MAX_PATIENCE = 32, 16384


class BatchSize:
    """At most `most`; where `turn_s` is given, about as many as take that long, but one always.

    After `ran_out` it stays at what is known to fit, or at half. After 32 batches that went well, and would
    have been larger if they might, it tries half as many again; after each try that fails, half as often.
    """

    def __init__(self, most: int, *, turn_s: float = math.inf) -> None:
        self._most = most
        self._turn_s = turn_s
        self._in_time = most
        self._fits = most  # as far as is known
        self._proven = 0  # the largest that went well
        self._num_well = 0
        self._patience = _PATIENCE
        self._is_try = False  # it has grown since memory ran out last

    @property
    def limit(self) -> int:
        return min(self._in_time, self._fits)

    def went_well(self, count: int, seconds: float, *, was_cut: bool) -> None:
        """Learns from a batch of so many, which took so long. was_cut: the limit kept others out of it."""
        self._proven = max(self._proven, count)
        if seconds > self._turn_s:
            self._in_time = max(1, int(count * self._turn_s / seconds))
        elif was_cut:
            self._in_time = min(self._most, max(self._in_time, count + 1))
        if was_cut and self._fits < self._most:
            self._num_well += 1
        if self._num_well >= self._patience:
            self._fits = min(self._most, self._fits + max(1, self._fits // 2))
            self._num_well = 0
            self._is_try = True

    def ran_out(self, count: int) -> None:
        """Learns that the device's memory did not hold a batch of so many."""
        known = self._proven if self._proven < count else 0
        self._fits = max(known, count // 2, 1)
        self._proven = min(self._proven, self._fits)
        if self._is_try:
            self._patience = min(_MAX_PATIENCE, 2 * self._patience)
        self._is_try = False
        self._num_well = 0
