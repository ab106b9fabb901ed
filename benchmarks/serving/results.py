"""Results of the scenarios, and the targets of the service."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.reporting import Spread, spread_of
from benchmarks.serving.overload import FAST_REJECTION_S, LoadPoint
from benchmarks.serving.scenarios import Figures, Times
from benchmarks.serving.servers import FASTAPI, LITSERVE, SERVICE, PerServer

OVERLOAD = 2.0


@dataclass(frozen=True, slots=True)
class Results:
    """One entry per repeat; empty if a scenario was not selected.

    capacity: responses per second in a closed loop; the loads are multiples of it.
    """

    alone: Sequence[PerServer[Figures]]
    together: Sequence[PerServer[Figures]]
    questions: Sequence[Times]
    cache: Sequence[Times]
    loads: Sequence[PerServer[Sequence[LoadPoint]]]
    capacity: PerServer[float] | None


LOADS_OF: tuple[tuple[str, Callable[[PerServer[Sequence[LoadPoint]]], Sequence[LoadPoint]]], ...] = (
    (SERVICE, lambda per_server: per_server.service),
    (FASTAPI, lambda per_server: per_server.fastapi),
    (LITSERVE, lambda per_server: per_server.litserve),
)


@dataclass(frozen=True, slots=True)
class Target:
    """A figure and its limit.

    relation: "at least", "at most" or "below". measured: None if nothing was measured.
    """

    name: str
    measured: Spread | None
    relation: str
    limit: float

    @property
    def verdict(self) -> str:
        """Return whether the median meets the limit."""
        if self.measured is None:
            return "not measured"
        value = self.measured.median
        within = value < self.limit or (self.relation == "at most" and value == self.limit)
        met = value >= self.limit if self.relation == "at least" else within
        return "met" if met else "**missed**"


def targets_of(results: Results) -> list[Target]:
    """Compute all targets of the selected scenarios; ratios are computed per repeat."""
    targets = []
    if results.alone:
        ratio = _ratio(results.alone, lambda figures: figures.service.p50_s / figures.fastapi.p50_s)
        targets.append(Target(f"sequential: p50, {SERVICE} / {FASTAPI}", ratio, "at most", 1))
    if results.together:
        targets += _throughput_targets(results.together)
    if results.questions:
        ratio = spread_of(times.second_s / times.first_s for times in results.questions)
        targets.append(
            Target(f"questions about one image: time, {FASTAPI} / {SERVICE}", ratio, "at least", 5)
        )
    if results.loads:
        targets += _overload_targets([per_server.service for per_server in results.loads])
    return targets


def _throughput_targets(repeats: Sequence[PerServer[Figures]]) -> Iterator[Target]:
    by_fastapi = _ratio(repeats, lambda figures: figures.service.per_s / figures.fastapi.per_s)
    by_litserve = _ratio(repeats, lambda figures: figures.service.per_s / figures.litserve.per_s)
    for kind, limit_fastapi, limit_litserve in (("floor", 3.5, 1.4), ("goal", 5, 2)):
        yield Target(
            f"concurrent: captions/s, {SERVICE} / {FASTAPI}, {kind}", by_fastapi, "at least", limit_fastapi
        )
        yield Target(
            f"concurrent: captions/s, {SERVICE} / {LITSERVE}, {kind}", by_litserve, "at least", limit_litserve
        )
    p99_by_fastapi = _ratio(repeats, lambda figures: figures.service.p99_s / figures.fastapi.p99_s)
    p99_by_litserve = _ratio(repeats, lambda figures: figures.service.p99_s / figures.litserve.p99_s)
    yield Target(f"concurrent: p99, {SERVICE} / {FASTAPI}", p99_by_fastapi, "below", 1)
    yield Target(f"concurrent: p99, {SERVICE} / {LITSERVE}", p99_by_litserve, "below", 1)


def _overload_targets(repeats: Sequence[Sequence[LoadPoint]]) -> Iterator[Target]:
    overloads = [next(point for point in points if point.multiple == OVERLOAD) for points in repeats]
    peaks = [max(point.goodput_per_s for point in points) for points in repeats]
    ratios = [point.goodput_per_s / peak for point, peak in zip(overloads, peaks, strict=True) if peak]
    kept = spread_of(ratios) if ratios else None
    yield Target(f"goodput at {OVERLOAD:g} times the capacity / peak goodput", kept, "at least", 0.9)
    fast = [point.share_rejected_fast for point in overloads if point.share_rejected_fast is not None]
    yield Target(
        f"rejected within {FAST_REJECTION_S * 1000:.0f} ms / rejected, at {OVERLOAD:g} times the capacity",
        spread_of(fast) if fast else None,
        "at least",
        0.95,
    )


def _ratio(repeats: Sequence[PerServer[Figures]], ratio: Callable[[PerServer[Figures]], float]) -> Spread:
    return spread_of(ratio(per_server) for per_server in repeats)
