"""A circuit breaker: after repeated failures Redis is not called for a while, so an outage costs little."""

import random
import time
from collections import deque
from collections.abc import Callable

_MAX_FAILURES_IN_A_ROW = 5
_WINDOW = 20
_MIN_PAUSE_S, _MAX_PAUSE_S = 1.0, 30.0
_SPREAD = 0.25


class CircuitBreaker:
    """Opens after five failures in a row, or when more than half of the last twenty calls failed.

    While open, no call is allowed; after a pause, which doubles from 1 to 30 seconds with each failed probe,
    one probe is. For one thread. clock: monotonic seconds. jitter: numbers in [0, 1).
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, jitter: Callable[[], float] = random.random
    ) -> None:
        self._clock = clock
        self._jitter = jitter
        self._recent: deque[bool] = deque(maxlen=_WINDOW)  # True: failed
        self._failures_in_a_row = 0
        self._pause_s = _MIN_PAUSE_S
        self._open_until: float | None = None
        self._probing = False

    @property
    def is_open(self) -> bool:
        return self._open_until is not None

    def allow(self) -> bool:
        """Return whether a call may be made now; its outcome is reported by one of the next three methods."""
        if self._open_until is None:
            return True
        if self._probing or self._clock() < self._open_until:
            return False
        self._probing = True
        return True

    def succeeded(self) -> None:
        """Record a success; close the breaker."""
        self._failures_in_a_row = 0
        if self._open_until is None:
            self._recent.append(False)
        else:
            self._close()

    def failed(self) -> None:
        """Record a failure; open the breaker after too many."""
        self._failures_in_a_row += 1
        if self._probing:
            self._pause_s = min(_MAX_PAUSE_S, self._pause_s * 2)
            self._open()
            return
        self._recent.append(True)
        many = len(self._recent) == _WINDOW and sum(self._recent) > _WINDOW // 2
        if self._open_until is None and (self._failures_in_a_row >= _MAX_FAILURES_IN_A_ROW or many):
            self._open()

    def abandoned(self) -> None:
        """Record that the caller cancelled the call, which proves nothing about Redis."""
        self._probing = False

    def _open(self) -> None:
        self._probing = False
        self._open_until = self._clock() + self._pause_s * (1 + _SPREAD * self._jitter())

    def _close(self) -> None:
        self._probing = False
        self._open_until = None
        self._pause_s = _MIN_PAUSE_S
        self._recent.clear()
