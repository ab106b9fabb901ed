"""The bounded line between the event loop and the engine.

The event loop reserves places before it decodes an image, so a full line answers at once and bounds the
decoded images in memory too. The engine takes jobs from the front. Both sides hold the lock for moments.
"""

import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Self

from service.engine.request import Job, Lane
from service.errors import NotReadyError, OverloadedError

_RATE_MEMORY_S = 30.0
_MIN_RETRY_S, _MAX_RETRY_S = 1, 60
_RETRY_SPREAD = 0.25


class ServiceRate:
    """How many items are finished per busy second, recent ones weighing more.

    jitter: gives numbers in [0, 1), so that those who were refused together do not come back together.
    """

    def __init__(self, jitter: Callable[[], float] = random.random) -> None:
        self._jitter = jitter
        self._items = 0.0
        self._busy_s = 0.0

    def note(self, num_items: int, busy_s: float) -> None:
        """Counts what one turn of the engine finished, and how long the turn took."""
        decay = math.exp(-busy_s / _RATE_MEMORY_S)
        self._items = self._items * decay + num_items
        self._busy_s = self._busy_s * decay + busy_s

    def seconds_for(self, num_items: int) -> int:
        """Gives the time to serve so many, plus at most a quarter of it, as whole seconds from 1 to 60."""
        seconds = num_items * self._busy_s / self._items if self._items > 0 else 0.0
        seconds *= 1 + _RETRY_SPREAD * self._jitter()
        return max(_MIN_RETRY_S, min(_MAX_RETRY_S, math.ceil(seconds)))


class Place:
    """Room for one job. On exit, a job that still waits is withdrawn; one the engine took is not touched."""

    def __init__(self, line: "Line", num_items: int) -> None:
        self.num_items = num_items
        self.job: Job | None = None
        self._line = line

    def put(self, job: Job) -> None:
        """Puts the job at the end of the line. Raises NotReadyError where the line was closed meanwhile."""
        self._line.put(self, job)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._line.leave(self)


class Line:
    """First come, first served; bounded in items (captions, questions, candidates), not in requests.

    rate: the measured service rate, from which Retry-After is computed.
    """

    def __init__(self, max_items: int, rate: ServiceRate) -> None:
        self._max_items = max_items
        self._rate = rate
        self._changed = threading.Condition()
        self._held: set[Place] = set()
        self._queue: deque[Place] = deque()
        self._num_items = 0
        self._closed: str | None = None

    @property
    def num_items(self) -> int:
        """How many items wait, those whose image is still being decoded included."""
        return self._num_items

    def oldest_wait_s(self) -> float:
        """Gives how long the job at the front has waited; 0 where there is none."""
        with self._changed:
            job = self._queue[0].job if self._queue else None
        return 0.0 if job is None else time.monotonic() - job.ticket.submitted

    def reserve(self, *sizes: int) -> tuple[Place, ...]:
        """Gives one place for each size, or none at all.

        Raises OverloadedError where there is not room for all, NotReadyError where the line is closed.
        """
        wanted = sum(sizes)
        with self._changed:
            self._refuse_if_closed()
            if self._num_items + wanted > self._max_items:
                raise OverloadedError(
                    f"{self._num_items} items wait, this request brings {wanted} more, and the limit is "
                    f"{self._max_items}; send it again after the time in Retry-After",
                    retry_after_s=self._rate.seconds_for(self._num_items),
                )
            places = tuple(Place(self, size) for size in sizes)
            self._held.update(places)
            self._num_items += wanted
        return places

    def put(self, place: Place, job: Job) -> None:
        with self._changed:
            self._refuse_if_closed()
            place.job = job
            self._queue.append(place)
            self._changed.notify()

    def leave(self, place: Place) -> None:
        with self._changed:
            if place in self._held:
                self._give_up(place)
                if place.job is not None:
                    self._queue.remove(place)

    def take(self, lanes: Collection[Lane]) -> tuple[Job, int] | None:
        """Takes the oldest job of these lanes and its number of items; None where none of them waits."""
        if not lanes:
            return None
        with self._changed:
            for place in self._queue:
                assert place.job is not None
                if place.job.lane in lanes:
                    self._queue.remove(place)
                    self._give_up(place)
                    return place.job, place.num_items
        return None

    def wait(self) -> bool:
        """Blocks until a job waits; False once the line is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            return self._closed is None

    def close(self, reason: str) -> list[Job]:
        """Refuses all that come from now on, and gives back the jobs that waited."""
        with self._changed:
            self._closed = self._closed or reason
            jobs = [place.job for place in self._queue if place.job is not None]
            self._held.clear()
            self._queue.clear()
            self._num_items = 0
            self._changed.notify_all()
        return jobs

    def _give_up(self, place: Place) -> None:
        self._held.remove(place)
        self._num_items -= place.num_items

    def _refuse_if_closed(self) -> None:
        if self._closed is not None:
            raise NotReadyError(self._closed, retry_after_s=_MIN_RETRY_S)
