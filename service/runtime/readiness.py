"""Whether requests can be served now, and how many are in flight: the state that routes and probes read."""

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, Final, Literal, TypeVar

from service.errors import DrainingError, NotReadyError, TaskUnavailableError
from service.model_backend import Backend
from service.runtime.assembly import Service

_RETRY_S: Final = 5

T = TypeVar("T")
TaskName = Literal["caption", "vqa", "retrieve"]


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
        task, drain = asyncio.create_task(upload), asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait({task, drain}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise _draining_error()
            return task.result()
        finally:
            task.cancel()
            drain.cancel()
            await asyncio.gather(task, drain, return_exceptions=True)


def tasks_of(backend: Backend) -> list[TaskName]:
    """Return the tasks this model has the weights for."""
    generating: list[TaskName] = ["caption", "vqa"] if backend.can_generate else []
    matching: list[TaskName] = ["retrieve"] if backend.can_match else []
    return generating + matching


def _draining_error() -> DrainingError:
    return DrainingError("this process is shutting down; ask another", retry_after_s=_RETRY_S)
