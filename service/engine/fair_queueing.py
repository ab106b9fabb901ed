"""Start-time fair queueing: of workloads by device time, of callers and their requests by cost."""

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from service.engine.request import AnyRequest

T = TypeVar("T")


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


class RequestOrder:
    """The order of one caller's requests: by when each would begin its last prompt, if all shared the device.

    So requests of few prompts pass those of many, equal ones stay in order and end one by one, and nobody
    waits for ever: the virtual time, at which newcomers start, advances with all service.
    """

    def __init__(self) -> None:
        self._starts: dict[AnyRequest, float] = {}  # of the last prompt, in virtual time
        self._virtual_time = 0.0

    @property
    def is_empty(self) -> bool:
        return not self._starts

    def next(self, requests: Collection[AnyRequest]) -> AnyRequest:
        """Return the request that comes first; of equal ones the first of `requests`."""
        for request in requests:
            if request not in self._starts:
                self._starts[request] = self._virtual_time + request.inputs.early_cost
        return min(requests, key=self._starts.__getitem__)

    def charge(self, cost: float) -> None:
        """Add what a request was given."""
        self._virtual_time += cost / max(1, len(self._starts))

    def forget(self, request: AnyRequest) -> None:
        self._starts.pop(request, None)


class FairOrder:
    """The order of admitted requests: callers take turns by cost, and the requests of each have an order."""

    def __init__(self) -> None:
        self._caller_order = WeightedFairScheduler[str]()
        self._requests: dict[str, RequestOrder] = defaultdict(RequestOrder)

    def next(self, requests: Collection[AnyRequest]) -> AnyRequest:
        """Return the request that is to be served next; of equal ones the first."""
        caller = self._caller_order.next(dict.fromkeys(request.caller for request in requests))
        return self._requests[caller].next([request for request in requests if request.caller == caller])

    def charge(self, request: AnyRequest, cost: float) -> None:
        """Add what a request was given."""
        self._caller_order.charge(request.caller, cost)
        self._requests[request.caller].charge(cost)

    def forget(self, request: AnyRequest) -> None:
        """Forget a request that is done."""
        if request.caller in self._requests:
            self._requests[request.caller].forget(request)
            if self._requests[request.caller].is_empty:
                del self._requests[request.caller]


class FairSemaphore:
    """A semaphore for which callers take turns; those that wait for one caller are served in order.

    For the event loop.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_free = num_slots
        self._caller_order = WeightedFairScheduler[str]()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = defaultdict(deque)

    @asynccontextmanager
    async def hold(self, caller: str) -> AsyncIterator[None]:
        """Wait for a slot, and hold it inside the block."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting[caller].append(turn)
        self._serve()
        try:
            await turn
            yield
        finally:
            if not turn.cancelled():
                self._num_free += 1
                self._serve()

    def _serve(self) -> None:
        """Hand free slots to those that wait; those that were cancelled meanwhile are forgotten."""
        while self._num_free and self._waiting:
            caller = self._caller_order.next(self._waiting)
            turn = self._waiting[caller].popleft()
            if not self._waiting[caller]:
                del self._waiting[caller]
            if not turn.cancelled():
                self._caller_order.charge(caller, 1.0)
                self._num_free -= 1
                turn.set_result(None)
