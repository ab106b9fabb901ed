"""Whether requests can be served now, and what is in flight: the state that routes and probes read."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Final, Literal, TypeVar

from service.errors import DrainingError, NotReadyError, OverloadedError, TaskUnavailableError
from service.model_backend import Backend
from service.runtime.assembly import Service

_RETRY_S: Final = 5
_UPLOAD_RETRY_S: Final = (2, 8)  # a range, so that callers refused together do not come back together
_SMALL_BODY_BYTES: Final = 2**20
_MIN_ARRIVAL_S: Final = 1.0  # during which an upload is not displaced

T = TypeVar("T")
TaskName = Literal["caption", "vqa", "retrieve"]


class InterruptedWorkError(Exception):
    """Work was cancelled; is_late: because its time was over, and not by an event."""

    def __init__(self, *, is_late: bool) -> None:
        self.is_late = is_late


async def unless(
    event: Coroutine[Any, Any, object], work: Coroutine[Any, Any, T], *, timeout_s: float | None = None
) -> T:
    """Await the work. Cancels it, and raises InterruptedWorkError, where event or time comes first."""
    task, interruption = asyncio.create_task(work), asyncio.create_task(event)
    try:
        await asyncio.wait({task, interruption}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise InterruptedWorkError(is_late=not interruption.done())
        return task.result()
    finally:
        task.cancel()
        interruption.cancel()
        await asyncio.gather(task, interruption, return_exceptions=True)
        del task  # whose error would refer to this frame, and wait for the garbage collector


class Traffic:
    """Counts the requests in flight. For the event loop."""

    def __init__(self) -> None:
        self.num_requests = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> None:
        self.num_requests += 1
        self._idle.clear()

    def leave(self) -> None:
        self.num_requests -= 1
        if self.num_requests == 0:
            self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until none is in flight; return False where that takes longer."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return self.num_requests == 0


class Uploads:
    """A budget of bytes over all request bodies, each from its first byte until its images are decoded.

    Beyond the budget, a new upload displaces the slowest of those that still arrive. So unfinished uploads
    cannot keep others out. The last quarter of it is left to callers that hold nothing yet, and to small
    bodies. For the event loop.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes_of = Counter[str]()  # of each caller that holds any
        self.arriving: dict[UploadLease, None] = {}

    @property
    def num_bytes(self) -> int:
        return self._num_bytes_of.total()

    def open(self, caller: str) -> "UploadLease":
        return UploadLease(self, caller)

    def add(self, lease: "UploadLease", num_bytes: int) -> None:
        """Count bytes of a lease. Raises OverloadedError where there is not room for them."""
        holds_others = self._num_bytes_of[lease.caller] > lease.num_bytes
        is_small = lease.num_bytes + num_bytes <= _SMALL_BODY_BYTES
        limit = self._max_bytes * 3 // 4 if holds_others and not is_small else self._max_bytes
        excess = self.num_bytes + num_bytes - limit
        if excess > 0 and not self._displace_slowest(lease, excess):
            raise OverloadedError(
                f"request bodies of {self.num_bytes} bytes are in flight, this one adds {num_bytes}, and the "
                f"limit is {limit}; send it again after the time in Retry-After",
                retry_after_s=random.randint(*_UPLOAD_RETRY_S),
            )
        self._num_bytes_of[lease.caller] += num_bytes

    def remove(self, lease: "UploadLease", num_bytes: int) -> None:
        """Return bytes of a lease."""
        self._num_bytes_of[lease.caller] -= num_bytes
        if self._num_bytes_of[lease.caller] == 0:
            del self._num_bytes_of[lease.caller]

    def _displace_slowest(self, newcomer: "UploadLease", num_bytes: int) -> bool:
        """End arriving uploads until so many bytes are free; none if they all are not enough."""
        now = time.monotonic()
        displaced = []
        for lease in sorted(self.arriving, key=lambda lease: lease.bytes_per_s(now)):
            can_be_displaced = now - lease.started >= _MIN_ARRIVAL_S and not lease.has_expired
            if num_bytes > 0 and lease is not newcomer and can_be_displaced:
                displaced.append(lease)
                num_bytes -= lease.num_bytes
        if num_bytes > 0:
            return False
        for lease in displaced:
            lease.displace()
        return True


class UploadLease:
    """The bytes of one request body of a caller in the budget.

    num_bytes: as declared, or as arrived where that is more; less those released. is_displaced: by others.
    """

    def __init__(self, uploads: Uploads, caller: str) -> None:
        self._uploads = uploads
        self.caller = caller
        self._arrival: asyncio.Timeout | None = None
        self._num_arrived = 0
        self.started = time.monotonic()
        self.num_bytes = 0
        self.is_displaced = False

    @contextlib.asynccontextmanager
    async def arrive(self, timeout_s: float) -> AsyncIterator[None]:
        """Bound the arrival, in the block. Raises TimeoutError after the time, or when it is displaced."""
        self._uploads.arriving[self] = None
        try:
            async with asyncio.timeout(timeout_s) as self._arrival:
                yield
        finally:
            self._uploads.arriving.pop(self, None)

    def declare(self, num_bytes: int) -> None:
        """Count the declared size. Raises OverloadedError."""
        self._uploads.add(self, num_bytes)
        self.num_bytes += num_bytes

    def grow_to(self, num_arrived: int) -> None:
        """Count what has arrived by now, where it exceeds the declared size. Raises OverloadedError."""
        self._num_arrived = num_arrived
        if num_arrived > self.num_bytes and not self.is_displaced:
            self.declare(num_arrived - self.num_bytes)

    def keep(self, num_bytes: int) -> None:
        """Release all but so many bytes: the body is parsed, and only its images are held."""
        self.release(self.num_bytes - num_bytes)

    def release(self, num_bytes: int) -> None:
        """Return bytes that nothing holds any more."""
        num_bytes = min(num_bytes, self.num_bytes)
        self.num_bytes -= num_bytes
        self._uploads.remove(self, num_bytes)

    def close(self) -> None:
        self.release(self.num_bytes)

    @property
    def has_expired(self) -> bool:
        """Whether its time to arrive is over, and it ends at the next turn of the event loop."""
        return self._arrival is not None and self._arrival.expired()

    def bytes_per_s(self, now: float) -> float:
        return self._num_arrived / max(now - self.started, 1e-3)

    def displace(self) -> None:
        """End the arrival with a TimeoutError at the next turn of the event loop."""
        assert self._arrival is not None
        self.is_displaced = True
        self._uploads.arriving.pop(self, None)
        self._arrival.reschedule(asyncio.get_running_loop().time())
        self.close()


class Readiness:
    """The state of the service from loading to draining.

    service: the assembled parts, once the model is loaded. is_watched: whether the watchdog runs, which sets
    stall_reason while the engine makes no progress. lost_reason: why the engine is lost for good.
    not_ready_reason: what start-up waits for, or what failed.
    """

    def __init__(self) -> None:
        self.service: Service | None = None
        self.is_watched = False
        self.stall_reason: str | None = None
        self.lost_reason: str | None = None
        self.not_ready_reason = "the weights are being loaded"
        self.is_started = False
        self._draining = asyncio.Event()

    @property
    def backend(self) -> Backend | None:
        """The model, once it is loaded."""
        return None if self.service is None else self.service.backend

    @property
    def is_draining(self) -> bool:
        return self._draining.is_set()

    def start_draining(self) -> None:
        """Refuse new work from now on."""
        self._draining.set()

    @property
    def engine_problem(self) -> str | None:
        """Why the engine is lost or stalled; None while it makes progress or has nothing to do."""
        if self.lost_reason or self.service is None or not self.is_watched:
            return self.lost_reason
        if not self.service.engine.is_alive:
            return "the engine's thread has died; this process must be restarted"
        return self.stall_reason

    def check_started(self) -> None:
        """Raise NotReadyError until the weights are loaded and have passed their self-test."""
        if not self.is_started:
            raise NotReadyError(self.not_ready_reason, retry_after_s=_RETRY_S)

    def check_alive(self) -> None:
        """Raise NotReadyError where only a restart can help."""
        if problem := self.engine_problem:
            raise NotReadyError(problem, retry_after_s=_RETRY_S)

    def check_ready(self) -> None:
        """Raise NotReadyError or DrainingError where new work would not be answered."""
        if self.is_draining:
            raise _draining_error()
        self.check_started()
        self.check_alive()

    def service_for(self, task: TaskName) -> Service:
        """Return the service that answers a task.

        Raises as `check_ready`, and TaskUnavailableError where the checkpoint lacks the head.
        """
        self.check_ready()
        assert self.service is not None
        if task not in tasks_of(self.service.backend):
            raise TaskUnavailableError(
                f"the checkpoint {self.service.backend.name!r} has no weights for {task}; "
                f"set {'BLIP2_RETRIEVAL_MODEL' if task == 'retrieve' else 'BLIP2_MODEL'} to one that has"
            )
        return self.service

    async def unless_draining(self, upload: Coroutine[Any, Any, T]) -> T:
        """Await an upload. Raises DrainingError where draining begins before it is whole."""
        try:
            return await unless(self._draining.wait(), upload)
        except InterruptedWorkError:
            raise _draining_error() from None


def tasks_of(backend: Backend) -> list[TaskName]:
    """Return the tasks this model has the weights for."""
    generating: list[TaskName] = ["caption", "vqa"] if backend.can_generate else []
    matching: list[TaskName] = ["retrieve"] if backend.can_match else []
    return generating + matching


def _draining_error() -> DrainingError:
    return DrainingError("this process is shutting down; ask another", retry_after_s=_RETRY_S)
