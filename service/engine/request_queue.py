"""The bounded queue between the event loop and the engine: backpressure reaches callers as 429.

The event loop reserves room before it decodes an image, so a full queue answers at once and bounds the
decoded images in memory too. The engine takes the oldest request of an open admission class. Both sides
hold the lock briefly.
"""

import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Generic, Self, TypeVar

from service.engine.request import AdmissionClass, AnyRequest
from service.errors import NotReadyError, OverloadedError

_DECAY_S = 30.0
_MIN_RETRY_S, _MAX_RETRY_S = 1, 60
_RETRY_SPREAD = 0.25

T = TypeVar("T")


class Throughput:
    """Items finished per busy second, exponentially decayed.

    jitter: returns numbers in [0, 1), so that callers refused together do not come back together.
    """

    def __init__(self, jitter: Callable[[], float] = random.random) -> None:
        self._jitter = jitter
        self._items = 0.0
        self._busy_s = 0.0

    def record(self, num_items: int, busy_s: float) -> None:
        """Add what one step of the engine finished, and the step's duration."""
        decay = math.exp(-busy_s / _DECAY_S)
        self._items = self._items * decay + num_items
        self._busy_s = self._busy_s * decay + busy_s

    def seconds_for(self, num_items: int) -> int:
        """Compute the time to serve so many items, plus at most a quarter, in whole seconds from 1 to 60."""
        seconds = num_items * self._busy_s / self._items if self._items > 0 else 0.0
        seconds *= 1 + _RETRY_SPREAD * self._jitter()
        return max(_MIN_RETRY_S, min(_MAX_RETRY_S, math.ceil(seconds)))


class WeightedFairScheduler(Generic[T]):
    """Fair queueing: workloads get device time in proportion to their weights, while several have work.

    After a pause a workload starts at the current virtual time: it has neither credit nor debt.
    """

    def __init__(self, weights: Mapping[T, float]) -> None:
        self._weights = weights
        self._virtual_times_s = dict.fromkeys(weights, 0.0)  # divided by the weight
        self._virtual_time_s = 0.0  # of the one that was served last
        self._contending: frozenset[T] = frozenset()

    def next(self, ready: Collection[T]) -> T:
        """Return the one of `ready`, all of which have work, that has had the least time by weight."""
        for name in ready:
            if name not in self._contending:
                self._virtual_times_s[name] = max(self._virtual_times_s[name], self._virtual_time_s)
        self._contending = frozenset(ready)
        chosen = min(ready, key=self._virtual_times_s.__getitem__)
        self._virtual_time_s = self._virtual_times_s[chosen]
        return chosen

    def charge(self, name: T, seconds: float) -> None:
        """Add the duration of one step."""
        self._virtual_times_s[name] += seconds / self._weights[name]


class Reservation:
    """Room for one request. On exit, a request that still waits is withdrawn; an admitted one is not."""

    def __init__(self, queue: "RequestQueue", num_items: int) -> None:
        self.num_items = num_items
        self.request: AnyRequest | None = None
        self._queue = queue

    def submit(self, request: AnyRequest) -> None:
        """Append the request to the queue. Raises NotReadyError where the queue was closed meanwhile."""
        request.num_items = self.num_items
        self._queue.append(self, request)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._queue.withdraw(self)


class RequestQueue:
    """FIFO within each admission class; bounded in items (captions, questions, candidates), not in requests.

    throughput: the measured one, from which Retry-After is computed.
    """

    def __init__(self, max_items: int, throughput: Throughput) -> None:
        self._max_items = max_items
        self._throughput = throughput
        self._changed = threading.Condition()
        self._reservations: set[Reservation] = set()
        self._waiting: deque[Reservation] = deque()  # those with a request
        self._num_items = 0
        self._closed: str | None = None

    @property
    def num_items(self) -> int:
        """Number of items that wait, including those whose image is still being decoded."""
        return self._num_items

    def oldest_wait_s(self) -> float:
        """Return how long the oldest request has waited; 0 where there is none."""
        with self._changed:
            request = self._waiting[0].request if self._waiting else None
        return 0.0 if request is None else time.monotonic() - request.submitted

    def make_reservations(self, *sizes: int) -> tuple[Reservation, ...]:
        """Reserve room for requests of these numbers of items, or for none of them.

        Raises OverloadedError where there is not room for all, NotReadyError where the queue is closed.
        """
        total = sum(sizes)
        with self._changed:
            self._refuse_if_closed()
            if self._num_items + total > self._max_items:
                raise OverloadedError(
                    f"{self._num_items} items wait, this request brings {total} more, and the limit is "
                    f"{self._max_items}; send it again after the time in Retry-After",
                    retry_after_s=self._throughput.seconds_for(self._num_items),
                )
            reservations = tuple(Reservation(self, size) for size in sizes)
            self._reservations.update(reservations)
            self._num_items += total
        return reservations

    def append(self, reservation: Reservation, request: AnyRequest) -> None:
        with self._changed:
            self._refuse_if_closed()
            reservation.request = request
            self._waiting.append(reservation)
            self._changed.notify()

    def withdraw(self, reservation: Reservation) -> None:
        with self._changed:
            if reservation in self._reservations:
                self._release(reservation)
                if reservation.request is not None:
                    self._waiting.remove(reservation)

    def take(self, classes: Collection[AdmissionClass]) -> AnyRequest | None:
        """Remove and return the oldest request of these classes; None where none of them waits."""
        if not classes:
            return None
        with self._changed:
            for reservation in self._waiting:
                request = reservation.request
                assert request is not None
                if request.admission_class in classes:
                    self._waiting.remove(reservation)
                    self._release(reservation)
                    return request
        return None

    def wait(self) -> bool:
        """Block until a request waits; False once the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return self._closed is None

    def close(self, reason: str) -> list[AnyRequest]:
        """Refuse all that come from now on, and return the requests that waited."""
        with self._changed:
            self._closed = self._closed or reason
            requests = [each.request for each in self._waiting if each.request is not None]
            self._reservations.clear()
            self._waiting.clear()
            self._num_items = 0
            self._changed.notify_all()
        return requests

    def _release(self, reservation: Reservation) -> None:
        self._reservations.remove(reservation)
        self._num_items -= reservation.num_items

    def _refuse_if_closed(self) -> None:
        if self._closed is not None:
            raise NotReadyError(self._closed, retry_after_s=_MIN_RETRY_S)
