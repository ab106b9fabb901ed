"""The life of the service: load, warm up, serve under a watchdog, drain, stop."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

from model import ModelError
from service.engine.engine import Engine
from service.errors import NotReadyError
from service.model_backend import Backend
from service.request_ids import logged_for
from service.runtime.assembly import assemble
from service.runtime.logs import FIELDS
from service.runtime.metrics import Metrics
from service.runtime.readiness import Readiness, Traffic
from service.runtime.settings import Settings, SettingsError
from service.runtime.warmup import SelfTestError, warm_up
from service.runtime.watchdog import return_memory_regularly, thread_stacks, wait_until_lost

logger = logging.getLogger(__name__)

_MIN_STALL_TIMEOUT_S: Final = 5.0
_LAST_ANSWERS_S: Final = 2.0
_LAST_PROBES_S: Final = 1.0  # in which probes and new callers can read why the engine is lost

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
    self-test neither is, unless the engine died: the process stays, and /readyz shows why it will not serve.
    A lost engine's callers are answered at once; on_failure follows later, so that probes see the reason.
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
        self.readiness = Readiness()
        self._settings = settings
        self._metrics = metrics
        self._traffic = traffic
        self._load = load
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._startup: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._returning_memory: asyncio.Task[None] | None = None
        self._loader: threading.Thread | None = None

    @property
    def is_loading(self) -> bool:
        """Whether the loader's thread still runs, which nothing can stop."""
        return self._loader is not None and self._loader.is_alive()

    def start(self) -> None:
        """Begin to load; to be called once, on the event loop."""
        self._startup = asyncio.create_task(self._start_up(), name="start-up")
        self._startup.add_done_callback(self._report_startup)

    async def drain(self) -> None:
        """Refuse new work, wait for what runs as long as the settings allow, and stop the engine."""
        self.readiness.start_draining()
        logger.info("draining, %d requests in flight", self._traffic.num_requests)
        in_time = await self._traffic.wait_idle(self._settings.drain_timeout_ms / 1000)
        if not in_time:
            logger.warning("%d requests were not answered in time", self._traffic.num_requests)
        await self._stop_engine()
        if not in_time:
            await self._traffic.wait_idle(_LAST_ANSWERS_S)  # for their 503

    async def aclose(self) -> None:
        """Stop and close everything."""
        self.readiness.start_draining()
        if self._startup is not None:
            self._startup.cancel()
            await asyncio.gather(self._startup, return_exceptions=True)
        if self._returning_memory is not None:
            self._returning_memory.cancel()
        await self._stop_engine()
        if self.readiness.service is not None:
            await self.readiness.service.aclose()

    async def _start_up(self) -> None:
        readiness = self.readiness
        loading: Future[Backend] = Future()
        # Not a pool's thread: the interpreter would wait for it, and loading may take minutes.
        self._loader = threading.Thread(target=_load, args=(self._load, loading), name="loader", daemon=True)
        self._loader.start()
        start_s = time.monotonic()
        backend = await asyncio.wrap_future(loading)
        load_end_s = time.monotonic()
        readiness.not_ready_reason = "the model is being warmed up"
        service = readiness.service = assemble(self._settings, backend, self._metrics)
        await service.image_decoder.start()
        if service.redis is not None:
            await service.redis.ping()
        try:
            await warm_up(backend, service.queue, service.engine, self._settings)
        except SelfTestError as exc:
            logger.critical("not ready: %s", exc)
            readiness.not_ready_reason = str(exc)
            if not service.engine.is_alive:
                raise StartupError(str(exc)) from exc
            return
        readiness.is_watched, timeout_s = True, self._stall_timeout_s(service.engine.longest_step_s)
        self._watching = asyncio.create_task(self._await_loss(service.engine, timeout_s), name="watchdog")
        self._returning_memory = asyncio.create_task(return_memory_regularly())
        readiness.is_started = True
        logger.info(
            "ready: the weights were loaded in %.1f s and warmed up in %.1f s",
            load_end_s - start_s,
            time.monotonic() - load_end_s,
        )
        self._on_ready(backend)

    async def _await_loss(self, engine: Engine, stall_timeout_s: float) -> None:
        reason = await wait_until_lost(engine, self.readiness, stall_timeout_s)
        self.readiness.lost_reason = reason
        with logged_for(engine.request_ids):
            logger.critical("the engine is lost: %s", reason, extra={FIELDS: {"stacks": thread_stacks()}})
        engine.abort_all(reason)
        await self._traffic.wait_idle(_LAST_ANSWERS_S)
        await asyncio.sleep(_LAST_PROBES_S)
        self._on_failure(EngineLostError(reason))

    def _report_startup(self, startup: asyncio.Task[None]) -> None:
        error = None if startup.cancelled() else startup.exception()
        if self.readiness.is_draining:  # which is why it failed
            return
        if isinstance(error, ModelError | SettingsError | StartupError | NotReadyError):
            self._on_failure(StartupError(str(error)))
        elif error is not None:  # our own bug, then: the operator gets a line, the log the rest
            logger.critical("start-up failed", exc_info=error)
            self._on_failure(StartupError("start-up failed; see the log"))

    def _stall_timeout_s(self, longest_step_s: float) -> float:
        if self._settings.stall_timeout_ms is not None:
            return self._settings.stall_timeout_ms / 1000
        return max(_MIN_STALL_TIMEOUT_S, 4 * longest_step_s)

    async def _stop_engine(self) -> None:
        is_lost = self.readiness.lost_reason is not None
        if self._watching is not None:
            if not is_lost:  # else it still has to report that the process must end
                self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        self.readiness.is_watched = False  # an engine that was stopped is not lost
        if self.readiness.service is not None and not is_lost:
            await asyncio.to_thread(self.readiness.service.stop_engine)


def _load(load: Loader, loading: Future[Backend]) -> None:
    try:
        loading.set_result(load())
    except (ModelError, SettingsError) as exc:
        loading.set_exception(exc)
    finally:
        if not loading.done():  # the thread's death puts the traceback into the log
            loading.set_exception(StartupError("the model could not be loaded; see the log"))
