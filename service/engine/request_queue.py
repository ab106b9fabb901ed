"""The bounded queue between the event loop and the engine: backpressure reaches callers as 429.

The event loop reserves room before it decodes an image, so a full queue answers at once and bounds the
decoded images in memory too. The engine takes the next request of an open admission class: callers take
turns, by cost. Both sides hold the lock briefly.
"""

import math
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from service.engine.fair_queueing import WeightedFairScheduler
from service.engine.request import AdmissionClass, AnyRequest
from service.errors import NotReadyError, OverloadedError

_DECAY_S = 30.0
_MIN_RETRY_S, _MAX_RETRY_S = 1, 60
_RETRY_SPREAD = 0.25


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


class Reservation:
    """Room for one request. On exit, a request that still waits is withdrawn; an admitted one is not.

    num_bytes: of its decoded images; once it is submitted, of those that had to be decoded.
    """

    def __init__(self, queue: "RequestQueue", num_items: int, num_bytes: int, *, is_bulk: bool) -> None:
        self.num_items = num_items
        self.num_bytes = num_bytes
        self.is_bulk = is_bulk
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


@dataclass(slots=True)
class _Held:
    """The items and bytes that some of the reservations hold."""

    num_items: int = 0
    num_bytes: int = 0

    def add(self, num_items: int, num_bytes: int) -> None:
        self.num_items += num_items
        self.num_bytes += num_bytes


RequestsByCaller = dict[str, dict[AnyRequest, Reservation]]  # the requests of each caller, in their order


class RequestQueue:
    """Bounded in items (captions, questions, candidates), and in bytes of decoded images.

    Bulk requests hold at most half of the items, and other half of `max_bytes`: they keep no other request
    out. One that needs more than its limit of bytes, or than half of the items, is admitted where no other
    of its kind holds any. throughput: the measured one, from which Retry-After is computed. In each
    admission class callers take turns by the cost of their requests; those of one caller stay in order.
    """

    def __init__(self, max_items: int, throughput: Throughput, *, max_bytes: int = 2**63) -> None:
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._throughput = throughput
        self._changed = threading.Condition()
        self._reservations: set[Reservation] = set()
        self._order = {name: WeightedFairScheduler[str]() for name in AdmissionClass}  # of callers
        self._waiting: dict[AdmissionClass, RequestsByCaller] = {name: {} for name in AdmissionClass}
        self._held, self._bulk = _Held(), _Held()  # by all reservations, and by the bulk ones of them
        self._closed: str | None = None

    @property
    def num_items(self) -> int:
        """Number of items that wait, including those whose image is still being decoded."""
        return self._held.num_items

    def oldest_wait_s(self) -> float:
        """Return how long the oldest request has waited; 0 where there is none."""
        with self._changed:
            submitted = [request.submitted for request in self._all()]
        return time.monotonic() - min(submitted) if submitted else 0.0

    @property
    def num_bytes(self) -> int:
        """Number of bytes of decoded images that wait, or that are being decoded."""
        return self._held.num_bytes

    def make_reservations(
        self, *sizes: int, num_bytes: int = 0, is_bulk: bool = False
    ) -> tuple[Reservation, ...]:
        """Reserve room for requests of these numbers of items, or for none of them.

        num_bytes: of the decoded images of each request. is_bulk: whether they are bulk requests. Raises
        OverloadedError where there is not room for all, NotReadyError where the queue is closed.
        """
        with self._changed:
            self._refuse_if_closed()
            self._refuse_if_full(sum(sizes), num_bytes * len(sizes), is_bulk=is_bulk)
            reservations = tuple(Reservation(self, size, num_bytes, is_bulk=is_bulk) for size in sizes)
            self._reservations.update(reservations)
            for reservation in reservations:
                self._count(reservation, reservation.num_items, reservation.num_bytes)
        return reservations

    def append(self, reservation: Reservation, request: AnyRequest) -> None:
        with self._changed:
            self._refuse_if_closed()
            reservation.request = request
            if reservation in self._reservations:
                num_bytes = sum(image.num_bytes for image in request.inputs.images)
                self._count(reservation, 0, num_bytes - reservation.num_bytes)
                reservation.num_bytes = num_bytes
            self._waiting[request.admission_class].setdefault(request.caller, {})[request] = reservation
            self._changed.notify()

    def withdraw(self, reservation: Reservation) -> None:
        with self._changed:
            if reservation in self._reservations:
                if reservation.request is not None:
                    self._remove(reservation.request)
                self._release(reservation)

    def take(
        self,
        classes: Collection[AdmissionClass],
        fits: Callable[[AnyRequest], bool] = lambda _: True,
    ) -> AnyRequest | None:
        """Remove and return the next request of these classes; None where none of them waits, or fits.

        Of the first requests of several classes the oldest is taken.
        """
        if not classes:
            return None
        with self._changed:
            first = [
                request for name in classes if self._waiting[name] and fits(request := self._first(name))
            ]
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
            self._held, self._bulk = _Held(), _Held()
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
        self._count(reservation, -reservation.num_items, -reservation.num_bytes)

    def _count(self, reservation: Reservation, num_items: int, num_bytes: int) -> None:
        self._held.add(num_items, num_bytes)
        if reservation.is_bulk:
            self._bulk.add(num_items, num_bytes)

    def _refuse_if_full(self, num_items: int, num_bytes: int, *, is_bulk: bool) -> None:
        same_bytes = self._bulk.num_bytes if is_bulk else self._held.num_bytes - self._bulk.num_bytes
        max_bytes = self._max_bytes // 2 if is_bulk else self._max_bytes
        name = "bulk requests" if is_bulk else "requests"
        if self._held.num_items + num_items > self._max_items:
            refusal = (
                f"{self._held.num_items} items wait, this request brings {num_items} more, and the limit is "
                f"{self._max_items}"
            )
        elif is_bulk and self._bulk.num_items and self._bulk.num_items + num_items > self._max_items // 2:
            refusal = (
                f"{self._bulk.num_items} items of bulk requests wait, this one brings {num_items} more, and "
                f"their limit is {self._max_items // 2}"
            )
        elif num_bytes and same_bytes and same_bytes + num_bytes > max_bytes:
            refusal = (
                f"decoded images of {same_bytes} bytes wait in {name}, this one brings {num_bytes} more, and "
                f"the limit is {max_bytes}"
            )
        else:
            return
        raise OverloadedError(
            f"{refusal}; send it again after the time in Retry-After",
            retry_after_s=self._throughput.seconds_for(self._held.num_items),
        )

    def _refuse_if_closed(self) -> None:
        if self._closed is not None:
            raise NotReadyError(self._closed, retry_after_s=_MIN_RETRY_S)
