"""The one thread that owns the device: schedule → run → update. Knows no HTTP and no policy."""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch

from model.devices import is_out_of_memory
from service.engine.image_pool import ImagePool
from service.engine.isolation import Isolation
from service.engine.protocols import EngineMetrics, LocalEmbeddingCache
from service.engine.request import AnyRequest
from service.engine.request_queue import RequestQueue, Throughput
from service.engine.runners.decode_runner import DecodeRunner
from service.engine.runners.encoder_runner import EncoderRunner
from service.engine.runners.match_runner import MatchRunner
from service.engine.runners.text_embedder import TextEmbedder
from service.engine.scheduler import Scheduler
from service.engine.step import DecodeStep, EncodeStep, Step
from service.errors import LostRequestError, NotReadyError, OutOfDeviceMemoryError
from service.model_backend import Backend
from service.request_ids import REQUEST_IDS, logged_for

logger = logging.getLogger(__name__)


class Engine:
    """Serves the requests of `queue` until `stop`, or until the device is lost.

    max_rows, max_kv_bytes: see `Scheduler`. longest_step_s: the duration of the longest step so far.
    """

    def __init__(
        self,
        backend: Backend,
        queue: RequestQueue,
        local_cache: LocalEmbeddingCache,
        *,
        throughput: Throughput,
        metrics: EngineMetrics,
        max_rows: int,
        max_kv_bytes: int,
    ) -> None:
        self._backend = backend
        self._queue = queue
        self._throughput = throughput
        self._metrics = metrics
        self._pool = ImagePool(backend, local_cache)
        self._isolation = Isolation(backend, metrics)
        embedder = TextEmbedder(backend)
        self._encoder_runner = EncoderRunner(backend, local_cache, metrics)
        self._match_runner = MatchRunner(backend, embedder, local_cache, metrics)
        self._decode_runner = DecodeRunner(backend, metrics)
        self._scheduler = Scheduler(
            backend,
            self._isolation.bisections,
            max_rows=max_rows,
            max_kv_bytes=max_kv_bytes,
            cached_texts=embedder.get_cached,
        )
        self._heartbeat: float | None = None
        self._is_stopping = False
        self._has_ended = False
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self.longest_step_s = 0.0

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End the thread after its current step; unanswered requests then fail with NotReadyError."""
        self._is_stopping = True
        _refuse(self._queue.close("the service is shutting down"))
        if self._thread.ident is None:  # it was never started
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():  # in its last step
            _refuse(self._scheduler.requests)

    def abort_all(self, reason: str) -> None:
        """Fail every request, because the thread hangs or has died. For any thread."""
        self._is_stopping = True
        _refuse(self._queue.close(reason))
        _fail_as_lost(self._scheduler.requests)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._has_ended

    @property
    def num_running(self) -> int:
        """Number of items that were taken from the queue and are not answered yet."""
        return sum(request.num_items for request in self._scheduler.requests)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """The ids of the requests that were taken from the queue and are not answered yet."""
        return _ids_of(self._scheduler.requests)

    @property
    def num_images(self) -> int:
        """Number of images held on the device for the running requests."""
        return len(self._pool)

    def heartbeat_age_s(self) -> float:
        """Return the seconds since the last progress; 0 while there is nothing to do. For any thread.

        Each layer of the model that ends is progress, so a step may take as long as it needs.
        """
        heartbeat = self._heartbeat
        if heartbeat is None:
            return self._queue.oldest_wait_s()
        return time.monotonic() - max(heartbeat, self._backend.last_progress)

    @torch.inference_mode()
    def _serve(self) -> None:
        try:
            while not self._is_stopping and (not self._scheduler.is_idle or self._queue.wait()):
                self._step()
                if self._scheduler.is_idle:
                    self._heartbeat = None
        finally:
            self._has_ended, self._heartbeat = True, None
            REQUEST_IDS.set(_ids_of(self._scheduler.requests))  # for the traceback, where the thread dies
            # Also where the device was lost: nobody may wait for an answer that cannot come.
            _refuse(self._queue.close("the engine has stopped; this process must be restarted"))
            if self._is_stopping:
                _refuse(self._scheduler.requests)
            _fail_as_lost(self._scheduler.requests)

    def _step(self) -> None:
        started = self._heartbeat = time.monotonic()
        self._admit()
        if step := self._scheduler.schedule():
            self._run_and_update(step)
        answered = self._scheduler.remove_done()
        seconds = time.monotonic() - started
        self._throughput.record(sum(request.num_items for request in answered), seconds)
        self.longest_step_s = max(self.longest_step_s, seconds)

    def _admit(self) -> None:
        while request := self._scheduler.admit(self._queue):
            if error := self._attempt(partial(self._acquire_images, request), lambda: [request]):
                request.fail(_image_error(error))

    def _acquire_images(self, request: AnyRequest) -> None:
        required = request.inputs.required
        is_bulk = request.inputs.is_bulk
        request.images = tuple(
            self._pool.acquire(image, required, is_bulk=is_bulk) for image in request.inputs.images
        )
        is_encoded = not any(image.needs_encoder(required) for image in request.images)
        request.image_cached = bool(request.images) and is_encoded

    def _run_and_update(self, step: Step) -> None:
        started = time.monotonic()
        error = self._attempt(partial(self._run, step), lambda: _served_by(step, self._scheduler.requests))
        if error is not None:
            if isinstance(step, DecodeStep):
                self._decode_runner.reset()
            self._isolation.recover(step, error)
        seconds = time.monotonic() - started
        self._scheduler.update(step, seconds, has_failed=error is not None)
        self._metrics.add_device_seconds(step.stage, seconds)

    def _run(self, step: Step) -> None:
        if isinstance(step, EncodeStep):
            self._encode(step)
        elif isinstance(step, DecodeStep):
            self._decode_runner.run(step)
        else:
            self._match_runner.run(step)

    def _encode(self, step: EncodeStep) -> None:
        try:
            self._encoder_runner.run(step.items)
            if step.scores:
                self._match_runner.keep_features(step.scores, step.items)
        finally:
            self._encoder_runner.release(step.items)

    def _attempt(
        self, work: Callable[[], None], served: Callable[[], Iterable[AnyRequest]]
    ) -> Exception | None:
        """Run `work`; return the error it raised, unless the device is lost: that ends the thread.

        served: returns the requests that the work is for.
        """
        failure: Exception | None = None
        try:
            work()
        except Exception as exc:  # the only broad one that is not raised again
            if isinstance(exc, torch.AcceleratorError) and not is_out_of_memory(exc):
                raise  # the device's context is lost: nothing can run any more, and /livez must show it
            with logged_for(_ids_of(served())):
                logger.warning("a step of the engine failed", exc_info=exc)
            failure = exc.with_traceback(None)  # its frames hold device tensors
        self._heartbeat = time.monotonic()
        return failure


def _ids_of(requests: Iterable[AnyRequest]) -> tuple[str, ...]:
    """Return the ids of requests, for log lines."""
    return tuple(request_id for request in requests for request_id in request.request_ids)


def _served_by(step: Step, requests: Iterable[AnyRequest]) -> list[AnyRequest]:
    """Return the requests that a step is for, among all that are admitted."""
    if isinstance(step, EncodeStep):
        return [request for request in requests if not set(step.items).isdisjoint(request.images)]
    return [item.request for item in step.items]


def _image_error(error: Exception) -> Exception:
    if is_out_of_memory(error):
        return OutOfDeviceMemoryError(
            "the device's memory does not hold this request's images beside what runs; send fewer, or later"
        )
    return error


def _fail_as_lost(requests: Iterable[AnyRequest]) -> None:
    """Fail requests that were on the device when it was lost: one of them may be the cause."""
    for request in requests:
        request.fail(
            LostRequestError("the engine was lost while it ran this request; do not send it again unchanged")
        )


def _refuse(requests: Iterable[AnyRequest]) -> None:
    """Fail requests that any other replica may serve."""
    for request in requests:
        request.fail(NotReadyError("the service stopped before this was answered; send it again"))
