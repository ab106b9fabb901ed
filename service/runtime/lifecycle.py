"""The life of the service: loading, ready, draining; and whether it is well."""

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Final, Literal, TypeVar

from model import ModelError
from service.api.middleware import Traffic
from service.engine.watchdog import EngineWatch, stacks
from service.errors import DrainingError, NotReadyError, TaskUnavailableError
from service.model_backend import Backend
from service.runtime.assembly import Parts, assemble
from service.runtime.logs import FIELDS
from service.runtime.metrics import Metrics
from service.runtime.settings import Settings, SettingsError
from service.runtime.warmup import SelfTestError, warm_up

logger = logging.getLogger(__name__)

_RETRY_S: Final = 5
_MIN_STALL_TIMEOUT_S: Final = 5.0
_LAST_ANSWERS_S: Final = 2.0
_LAST_LOOK_S: Final = 1.0  # for probes and new callers, to hear what is wrong

T = TypeVar("T")
Task = Literal["caption", "vqa", "retrieve"]
Loader = Callable[[], Backend]


class FatalError(Exception):
    """This process cannot serve, and must end; the message is one line for the operator."""


class StartupError(FatalError):
    """The model could not be loaded."""


class EngineLostError(FatalError):
    """The engine's thread is dead, or hangs."""


class Lifecycle:
    """Loads in the background, so that the probes answer meanwhile.

    on_ready(backend) and on_failure(error) are called on the event loop, each at most once. After a failed
    self-test neither is: the process stays, and says at /readyz why it will not serve. An engine that is lost
    has its callers told so at once, and is a failure a moment later, so that probes see the reason.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        traffic: Traffic,
        load: Loader,
        *,
        on_ready: Callable[[Backend], None],
        on_failure: Callable[[FatalError], None],
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._traffic = traffic
        self._load = load
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._parts: Parts | None = None
        self._why_not_ready = "the weights are being loaded"
        self._ready = False
        self._drain_begun = asyncio.Event()
        self._startup: asyncio.Task[None] | None = None
        self._watch: EngineWatch | None = None
        self._watching: asyncio.Task[None] | None = None
        self._lost: str | None = None

    @property
    def backend(self) -> Backend | None:
        """The model, once it is loaded."""
        return None if self._parts is None else self._parts.backend

    @property
    def draining(self) -> bool:
        return self._drain_begun.is_set()

    @property
    def stalled(self) -> str | None:
        """Says what is wrong with the engine; None while it makes progress, or has nothing to do."""
        if self._lost or self._watch is None:
            return self._lost
        return self._watch.problem

    def check_started(self) -> None:
        """Raises NotReadyError until the weights are loaded and have passed their self-test."""
        if not self._ready:
            raise NotReadyError(self._why_not_ready, retry_after_s=_RETRY_S)

    def check_alive(self) -> None:
        """Raises NotReadyError where only a restart can help."""
        if problem := self.stalled:
            raise NotReadyError(problem, retry_after_s=_RETRY_S)

    def check_ready(self) -> None:
        """Raises NotReadyError or DrainingError where new work would not be answered."""
        if self.draining:
            raise _draining()
        self.check_started()
        self.check_alive()

    def parts_for(self, task: Task) -> Parts:
        """Gives what serves a task.

        Raises as `check_ready`, and TaskUnavailableError where the checkpoint lacks the head.
        """
        self.check_ready()
        assert self._parts is not None
        if task not in tasks_of(self._parts.backend):
            raise TaskUnavailableError(
                f"the checkpoint {self._parts.backend.name!r} has no weights for {task}; "
                f"set {'BLIP2_RETRIEVAL_MODEL' if task == 'retrieve' else 'BLIP2_MODEL'} to one that has"
            )
        return self._parts

    async def unless_draining(self, upload: Coroutine[Any, Any, T]) -> T:
        """Gives what is uploaded. Raises DrainingError where draining begins before it is whole."""
        task, drain = asyncio.create_task(upload), asyncio.create_task(self._drain_begun.wait())
        try:
            await asyncio.wait({task, drain}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise _draining()
            return task.result()
        finally:
            task.cancel()
            drain.cancel()
            await asyncio.gather(task, drain, return_exceptions=True)

    def start(self) -> None:
        """Begins to load; to be called once, on the event loop."""
        self._startup = asyncio.create_task(self._start_up(), name="start-up")
        self._startup.add_done_callback(self._started)

    async def drain(self) -> None:
        """Refuses new work, waits for what runs, as long as the settings allow, and stops the engine."""
        self._drain_begun.set()
        logger.info("draining, %d requests in flight", self._traffic.num_requests)
        in_time = await self._traffic.wait_idle(self._settings.drain_timeout_ms / 1000)
        if not in_time:
            logger.warning("%d requests were not answered in time", self._traffic.num_requests)
        await self._stop_engine()
        if not in_time:
            await self._traffic.wait_idle(_LAST_ANSWERS_S)  # they are told so

    async def aclose(self) -> None:
        """Lets go of everything."""
        self._drain_begun.set()
        if self._startup is not None:
            self._startup.cancel()
            await asyncio.gather(self._startup, return_exceptions=True)
        await self._stop_engine()
        if self._parts is not None:
            await self._parts.aclose()

    async def _start_up(self) -> None:
        try:
            backend = await _in_daemon_thread(self._load)
            self._why_not_ready = "the model is being warmed up"
            self._parts = assemble(self._settings, backend, self._metrics)
            if self._parts.redis is not None:
                await self._parts.redis.greet()
            await warm_up(backend, self._parts.line, self._parts.engine.start)
        except SelfTestError as exc:
            logger.critical("not ready: %s", exc)
            self._why_not_ready = str(exc)
            if self._parts is not None and not self._parts.engine.alive:
                raise StartupError(str(exc)) from exc
            return
        engine = self._parts.engine
        self._watch = EngineWatch(engine, self._pick_stall_timeout(engine.longest_turn_s))
        self._watching = asyncio.create_task(self._await_loss(self._watch), name="watch")
        self._ready = True
        self._on_ready(backend)

    async def _await_loss(self, watch: EngineWatch) -> None:
        self._lost = problem = await watch.until_lost()
        assert self._parts is not None
        logger.critical("the engine is lost: %s", problem, extra={FIELDS: {"stacks": stacks()}})
        self._parts.engine.give_up(problem)
        await self._traffic.wait_idle(_LAST_ANSWERS_S)
        await asyncio.sleep(_LAST_LOOK_S)
        self._on_failure(EngineLostError(problem))

    def _started(self, startup: asyncio.Task[None]) -> None:
        error = None if startup.cancelled() else startup.exception()
        if self.draining:  # which is why it failed
            return
        if isinstance(error, ModelError | SettingsError | StartupError):
            self._on_failure(StartupError(str(error)))
        elif error is not None:  # our own bug, then: the operator gets a line, the log the rest
            logger.critical("start-up failed", exc_info=error)
            self._on_failure(StartupError("start-up failed; the log says why"))

    def _pick_stall_timeout(self, longest_turn_s: float) -> float:
        if self._settings.stall_timeout_ms is not None:
            return self._settings.stall_timeout_ms / 1000
        return max(_MIN_STALL_TIMEOUT_S, 4 * longest_turn_s)

    async def _stop_engine(self) -> None:
        if self._watching is not None:
            if not self._lost:  # else it still has to say that the process must end
                self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        self._watch = None  # an engine that was stopped is not lost
        if self._parts is not None and not self._lost:
            await asyncio.to_thread(self._parts.stop_engine)


def _draining() -> DrainingError:
    return DrainingError("this process is shutting down; ask another", retry_after_s=_RETRY_S)


def tasks_of(backend: Backend) -> list[Task]:
    """Gives the tasks this model has the weights for."""
    generating: list[Task] = ["caption", "vqa"] if backend.can_generate else []
    matching: list[Task] = ["retrieve"] if backend.can_match else []
    return generating + matching


async def _in_daemon_thread(load: Loader) -> Backend:
    # Not a pool's thread: the interpreter would wait for it, and loading may take minutes after a SIGTERM.
    loaded: Future[Backend] = Future()

    def run() -> None:
        try:
            loaded.set_result(load())
        except (ModelError, SettingsError) as exc:
            loaded.set_exception(exc)
        finally:
            if not loaded.done():  # the thread's death puts the traceback into the log
                loaded.set_exception(StartupError("the model could not be loaded; the log says why"))

    threading.Thread(target=run, name="loader", daemon=True).start()
    return await asyncio.wrap_future(loaded)
