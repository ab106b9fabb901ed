"""A job that the engine has taken in: its mutable half, which only the engine's thread sees."""

import time
from dataclasses import dataclass, field
from typing import TypeVar

from service.engine.image_pool import ImageSlot
from service.engine.request import Answer, DeviceTimes, Job, Lane

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Running:
    """num_rows: how many it may occupy at once. image_cached: it has images, and the tower need not run.

    slots: one for each of the job's images. is_ahead: its texts, if it has any, occupy no rows yet.
    max_rows: the most that ran at once, so far.
    """

    job: Job
    num_items: int
    num_rows: int
    slots: tuple[ImageSlot, ...] = ()
    image_cached: bool = False
    is_ahead: bool = True
    admitted: float = field(default_factory=time.monotonic)
    work_started: float | None = None
    max_rows: int = 1

    @property
    def lane(self) -> Lane:
        return self.job.lane

    @property
    def settled(self) -> bool:
        return self.job.ticket.settled

    @property
    def encoded(self) -> bool:
        return all(slot.holds(self.job.needs) for slot in self.slots)

    @property
    def encode_error(self) -> Exception | None:
        return next((slot.error for slot in self.slots if slot.error is not None), None)

    def saw_rows(self, num_rows: int) -> None:
        self.max_rows = max(self.max_rows, num_rows)

    def fail(self, error: Exception) -> None:
        self.job.ticket.fail(error)

    def answer(self, value: T) -> Answer[T]:
        """Wraps what the work gave."""
        assert self.work_started is not None
        # Passes that ran before this job came did not cost it time; those it shared count in full.
        batches = {batch for slot in self.slots for batch in slot.batches if batch.started >= self.admitted}
        return Answer(
            value=value,
            times=DeviceTimes(
                queue_s=self.admitted - self.job.ticket.submitted,
                vision_s=sum(batch.vision_s for batch in batches),
                qformer_s=sum(batch.qformer_s for batch in batches),
                work_s=time.monotonic() - self.work_started,
            ),
            image_cached=self.image_cached,
            max_rows=max([self.max_rows, *(batch.num_images for batch in batches)]),
            fresh=tuple(fresh for slot in self.slots for fresh in slot.take_fresh()),
        )
