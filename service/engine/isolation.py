"""Recovery from failed steps: find the item at fault by bisection, or run smaller batches."""

from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, Generic, TypeVar

from model.devices import is_out_of_memory
from service.engine.protocols import EngineMetrics
from service.engine.step import Step, Workload
from service.errors import OutOfDeviceMemoryError
from service.model_backend import Backend

T = TypeVar("T")


class Bisection(Generic[T]):
    """Groups of a failed batch in quarantine: they run one by one, before anything else of their kind."""

    def __init__(self) -> None:
        self._groups: deque[tuple[T, ...]] = deque()

    def split(self, batch: Sequence[T]) -> T | None:
        """Return the item at fault if the failed batch held nothing else; otherwise queue its halves."""
        if len(batch) == 1:
            return batch[0]
        middle = len(batch) // 2
        self._groups.extendleft((tuple(batch[middle:]), tuple(batch[:middle])))
        return None

    def next_group(self, pending: Collection[T]) -> list[T]:
        """Remove and return the next group, less the items that are not pending; [] where none is left."""
        while self._groups:
            if group := [item for item in self._groups.popleft() if item in pending]:
                return group
        return []


class Isolation:
    """Recovery from failed steps, the same for every workload. bisections: those under way."""

    def __init__(self, backend: Backend, metrics: EngineMetrics) -> None:
        self._backend = backend
        self._metrics = metrics
        self.bisections: dict[Workload, Bisection[Any]] = {}

    def recover(self, step: Step, error: Exception) -> None:
        """Fail the item at fault if it is known; otherwise arrange for smaller batches or a bisection."""
        if is_out_of_memory(error):
            self._shrink(step)
        elif poison := self.bisections.setdefault(step.workload, Bisection()).split(step.items):
            poison.fail(error)

    def _shrink(self, step: Step) -> None:
        self._metrics.count_out_of_memory(step.stage)
        self._backend.free_memory()
        if step.limit is not None and step.size:
            step.limit.observe_out_of_memory(step.size)
        if step.is_smallest:
            step.items[0].fail(OutOfDeviceMemoryError(f"the device's memory does not hold {step.too_large}"))
