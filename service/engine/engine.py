"""The one thread that owns the device: jobs in, answers out. Knows no HTTP.

Each turn takes in waiting jobs and does one piece of work: it encodes a batch of images, scores a batch of
pairs, or advances every running text by one token, whichever has had the least of the device (`SHARES`).
Nobody waits for a batch to fill; it blocks only when idle.
"""

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from model.devices import is_out_of_memory
from service.engine.admission import open_lanes
from service.engine.batch_size import TURN_S, BatchSize
from service.engine.decode_runner import GenerateStage
from service.engine.encoder_runner import MAX_IMAGES_PER_TURN, EncodeStage
from service.engine.engine_metrics import Meter
from service.engine.fair_share import DeviceShares
from service.engine.image_pool import EncodingMemory, Images
from service.engine.match_runner import MAX_PAIRS_PER_TURN, MatchStage
from service.engine.request import GenerateJob, Job, Lane
from service.engine.request_queue import Line, ServiceRate
from service.engine.sequence import Running
from service.errors import DeadlineExceededError, NotReadyError, OutOfDeviceMemoryError
from service.model_backend import Backend

logger = logging.getLogger(__name__)

# Of the device's time, while all have work. Images of texts go first, for texts that are decoded together
# cost less, and there are never more of them than texts have room for.
SHARES = {"images of texts": 40.0, "images of pairs": 1.0, "pairs": 1.0, "texts": 1.0}


class Stage(Protocol):
    """One kind of work, in pieces. `step` is called where there is work, `recover` where it failed.

    name: what the metrics call it.
    """

    name: str

    def has_work(self) -> bool: ...

    def step(self) -> None: ...

    def recover(self, error: Exception) -> None: ...


class Engine:
    """Serves the jobs of `line` until `stop`, or until the device is lost.

    max_rows: bounds the rows (beams, pairs) that run at once. longest_turn_s: so far.
    """

    def __init__(
        self,
        backend: Backend,
        line: Line,
        memory: EncodingMemory,
        *,
        rate: ServiceRate,
        max_rows: int,
        meter: Meter,
    ) -> None:
        self._line = line
        self._rate = rate
        self._max_rows = max_rows
        self._meter = meter
        self._images = Images(backend, memory)
        size = BatchSize(MAX_IMAGES_PER_TURN, turn_s=TURN_S)
        self._encode_for_texts = EncodeStage(backend, self._images, size, meter)
        self._encode_for_pairs = EncodeStage(backend, self._images, size, meter)
        self._match = MatchStage(backend, meter=meter)
        self._generate = GenerateStage(backend, max_rows=max_rows, meter=meter)
        self._stages: dict[str, Stage] = {
            "images of texts": self._encode_for_texts,
            "images of pairs": self._encode_for_pairs,
            "pairs": self._match,
            "texts": self._generate,
        }
        self._shares = DeviceShares(SHARES)
        self._running: list[Running] = []
        self._beat: float | None = None
        self._stopping = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.longest_turn_s = 0.0

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Ends the thread after its present turn; what is unanswered then fails with NotReadyError."""
        self._stopping = True
        _refuse(self._line.close("the service is shutting down"))
        if self._thread.ident is None:  # it was never started
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.give_up("the engine did not end in time")

    def give_up(self, reason: str) -> None:
        """Tells all callers that no answer will come, for the thread hangs or has died. From any thread."""
        self._stopping = True
        _refuse([*self._line.close(reason), *(running.job for running in list(self._running))])

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._ended

    @property
    def num_running(self) -> int:
        """How many items were taken out of the line and are not answered yet."""
        return sum(running.num_items for running in self._running)

    @property
    def num_images(self) -> int:
        """How many images are held on the device for the jobs that run."""
        return len(self._images)

    def heartbeat_age_s(self) -> float:
        """Gives the time since the last progress; while there is nothing to do, 0. For any thread."""
        beat = self._beat
        return self._line.oldest_wait_s() if beat is None else time.monotonic() - beat

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while not self._stopping and (self._running or self._line.wait()):
                self._turn()
                if not self._running:
                    self._beat = None
        finally:
            self._ended, self._beat = True, None
            # Also where the device was lost: nobody may wait for an answer that cannot come.
            _refuse(self._line.close("the engine has stopped; this process must be restarted"))
            _refuse([running.job for running in self._running])

    def _turn(self) -> None:
        started = self._beat = time.monotonic()
        self._admit()
        self._hand_on()
        self._work()
        self._let_go(time.monotonic() - started)

    def _admit(self) -> None:
        while taken := self._line.take(open_lanes(self._running, self._max_rows)):
            job, num_items = taken
            if job.ticket.expired(time.monotonic()):
                job.ticket.fail(DeadlineExceededError("the deadline passed while the request was in line"))
            elif not job.ticket.settled:
                self._guarded(partial(self._take_in, job, num_items), partial(_fail, job))

    def _take_in(self, job: Job, num_items: int) -> None:
        running = Running(job, num_items, _num_rows(job))
        self._running.append(running)  # before all that may fail: from here on it is answered in any case
        slots = running.slots = tuple(self._images.open_slot(image, job.needs) for image in job.images)
        running.image_cached = bool(slots) and not any(slot.needs_vision(job.needs) for slot in slots)

    def _hand_on(self) -> None:
        """Lets those whose images are encoded begin their work, and fails those whose image cannot be."""
        for running in self._running:
            if running.work_started is not None or running.settled:
                continue
            if running.encode_error is not None:
                running.fail(running.encode_error)
            elif running.encoded:
                self._guarded(partial(self._begin, running), partial(_fail, running.job))

    def _work(self) -> None:
        waiting = [
            running
            for running in self._running
            if running.work_started is None and not (running.encoded or running.settled)
        ]
        self._encode_for_texts.wait_for([each.slots for each in waiting if each.lane is not Lane.MATCH])
        self._encode_for_pairs.wait_for([each.slots for each in waiting if each.lane is Lane.MATCH])
        ready = [name for name, stage in self._stages.items() if stage.has_work()]
        if not ready:
            return
        chosen, started = self._shares.next(ready), time.monotonic()
        stage = self._stages[chosen]
        self._guarded(stage.step, stage.recover)
        seconds = time.monotonic() - started
        self._shares.charge(chosen, seconds)
        self._meter.spent(stage.name, seconds)

    def _begin(self, running: Running) -> None:
        running.work_started = time.monotonic()
        if isinstance(running.job, GenerateJob):
            self._generate.begin(running, running.job)
        else:
            self._match.begin(running, running.job)

    def _let_go(self, turn_s: float) -> None:
        settled = {running for running in self._running if running.settled}
        answered = [running for running in settled if not running.job.ticket.future.cancelled()]
        self._rate.note(sum(running.num_items for running in answered), turn_s)
        self._running = [running for running in self._running if running not in settled]
        self.longest_turn_s = max(self.longest_turn_s, turn_s)

    def _guarded(self, work: Callable[[], None], recover: Callable[[Exception], None]) -> None:
        failure: Exception | None = None
        try:
            work()
        except Exception as exc:  # the only broad one that is not raised again
            if isinstance(exc, torch.AcceleratorError) and not is_out_of_memory(exc):
                raise  # the device's context is lost: nothing can run any more, and /livez must say so
            logger.warning("a step of the engine failed", exc_info=exc)
            failure = exc.with_traceback(None)  # whose frames hold tensors, and memory may be what is short
        if failure is not None:
            recover(failure)
        self._beat = time.monotonic()


def _num_rows(job: Job) -> int:
    if isinstance(job, GenerateJob):
        return len(job.prompts) * job.params.num_rows
    return min(len(job.candidates), MAX_PAIRS_PER_TURN)


def _fail(job: Job, error: Exception) -> None:
    if is_out_of_memory(error):
        error = OutOfDeviceMemoryError(
            "the device's memory does not hold this request's images beside what runs; send fewer, or later"
        )
    job.ticket.fail(error)


def _refuse(jobs: list[Job]) -> None:
    for job in jobs:
        job.ticket.fail(NotReadyError("the service stopped before this was answered; send it again"))
