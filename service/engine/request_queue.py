"""The bounded queue between the event loop and the engine: backpressure reaches callers as 429.

The event loop reserves room before it decodes an image, so a full queue answers at once and bounds the
decoded images in memory too. The engine takes the next request of an open admission class: callers take
turns, by cost. Both sides hold the lock briefly.
"""

import math
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
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
    """Start-time fair queueing: names are served in proportion to their weights, while several have work.

    weights: 1 for names that are not in it, which may come and go. A name that comes starts at the current
    virtual time: it has neither credit nor debt. That time advances with all service, by the total weight,
    so an endless stream of new names overtakes none that waits for ever.
    """

    def __init__(self, weights: Mapping[T, float] | None = None) -> None:
        self._weights = weights or {}
        self._virtual_times: dict[T, float] = {}  # what each had, divided by its weight
        self._virtual_time = 0.0
        self._contending: frozenset[T] = frozenset()

    def next(self, ready: Collection[T]) -> T:
        """Return the one of `ready`, all of which have work, that has had the least by weight.

        Of equal ones the first. Names that left and owe nothing are forgotten.
        """
        times, now = self._virtual_times, self._virtual_time
        starts = {
            name: times[name] if name in self._contending else max(times.get(name, 0.0), now)
            for name in ready
        }
        self._virtual_times = {name: time for name, time in times.items() if time > now} | starts
        self._contending = frozenset(ready)
        chosen = min(ready, key=starts.__getitem__)
        self._virtual_time = max(now, starts[chosen])
        return chosen

    def charge(self, name: T, cost: float) -> None:
        """Add the cost of one service: seconds, or whatever is shared."""
        self._virtual_times[name] += cost / self._weights.get(name, 1.0)
        self._virtual_time += cost / sum(self._weights.get(each, 1.0) for each in self._contending)

    @property
    def is_empty(self) -> bool:
        return not self._virtual_times

    def forget(self, name: T) -> None:
        """Forget a name that never comes again."""
        self._virtual_times.pop(name, None)
        self._contending -= {name}


class FairOrder:
    """The order of admitted requests: callers take turns by cost, and so do the requests of each."""

    def __init__(self) -> None:
        self._caller_order = WeightedFairScheduler[str]()
        self._requests: dict[str, WeightedFairScheduler[AnyRequest]] = defaultdict(WeightedFairScheduler)

    def next(self, requests: Collection[AnyRequest]) -> AnyRequest:
        """Return the request that is to be served next; of equal ones the first."""
        caller = self._caller_order.next(dict.fromkeys(request.caller for request in requests))
        return self._requests[caller].next([request for request in requests if request.caller == caller])

    def charge(self, request: AnyRequest, cost: float) -> None:
        """Add what a request was given."""
        self._caller_order.charge(request.caller, cost)
        self._requests[request.caller].charge(request, cost)

    def forget(self, request: AnyRequest) -> None:
        """Forget a request that is done."""
        if request.caller in self._requests:
            self._requests[request.caller].forget(request)
            if self._requests[request.caller].is_empty:
                del self._requests[request.caller]


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


RequestsByCaller = dict[str, dict[AnyRequest, Reservation]]  # the requests of each caller, in their order


class RequestQueue:
    """Bounded in items (captions, questions, candidates), not in requests.

    In each admission class callers take turns by the cost of their requests; those of one caller stay in
    order. throughput: the measured one, from which Retry-After is computed.
    """

    def __init__(self, max_items: int, throughput: Throughput) -> None:
        self._max_items = max_items
        self._throughput = throughput
        self._changed = threading.Condition()
        self._reservations: set[Reservation] = set()
        self._order = {name: WeightedFairScheduler[str]() for name in AdmissionClass}  # of callers
        self._waiting: dict[AdmissionClass, RequestsByCaller] = {name: {} for name in AdmissionClass}
        self._num_items = 0
        self._closed: str | None = None

    @property
    def num_items(self) -> int:
        """Number of items that wait, including those whose image is still being decoded."""
        return self._num_items

    def oldest_wait_s(self) -> float:
        """Return how long the oldest request has waited; 0 where there is none."""
        with self._changed:
            submitted = [request.submitted for request in self._all()]
        return time.monotonic() - min(submitted) if submitted else 0.0

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
            self._waiting[request.admission_class].setdefault(request.caller, {})[request] = reservation
            self._changed.notify()

    def withdraw(self, reservation: Reservation) -> None:
        with self._changed:
            if reservation in self._reservations:
                if reservation.request is not None:
                    self._remove(reservation.request)
                self._release(reservation)

    def take(self, classes: Collection[AdmissionClass]) -> AnyRequest | None:
        """Remove and return the next request of these classes; None where none of them waits.

        Of the first requests of several classes the oldest is taken.
        """
        if not classes:
            return None
        with self._changed:
            first = [self._first(name) for name in classes if self._waiting[name]]
            if not first:
                return None
            request = min(first, key=lambda each: each.submitted)
            self._order[request.admission_class].charge(request.caller, request.inputs.cost)
            self._release(self._remove(request))
            return request

    def wait(self) -> bool:
        """Block until a request waits; False once the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: any(self._waiting.values()) or self._closed)
            return self._closed is None

    def close(self, reason: str) -> list[AnyRequest]:
        """Refuse all that come from now on, and return the requests that waited."""
        with self._changed:
            self._closed = self._closed or reason
            requests = list(self._all())
            self._reservations.clear()
            for by_caller in self._waiting.values():
                by_caller.clear()
            self._num_items = 0
            self._changed.notify_all()
        return requests

    def _all(self) -> Iterator[AnyRequest]:
        for by_caller in self._waiting.values():
            for requests in by_caller.values():
                yield from requests

    def _first(self, name: AdmissionClass) -> AnyRequest:
        by_caller = self._waiting[name]
        return next(iter(by_caller[self._order[name].next(by_caller.keys())]))

    def _remove(self, request: AnyRequest) -> Reservation:
        by_caller = self._waiting[request.admission_class]
        reservation = by_caller[request.caller].pop(request)
        if not by_caller[request.caller]:
            del by_caller[request.caller]
        return reservation

    def _release(self, reservation: Reservation) -> None:
        self._reservations.remove(reservation)
        self._num_items -= reservation.num_items

    def _refuse_if_closed(self) -> None:
        if self._closed is not None:
            raise NotReadyError(self._closed, retry_after_s=_MIN_RETRY_S)
