"""What the repeats of the scenarios gave, and the bars that the service is held to."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.serving.overload import FAST_SHED_S, LoadPoint
from benchmarks.serving.scenarios import Figures, Times
from benchmarks.serving.servers import LITSERVE, NAIVE, OURS, Sides
from benchmarks.spread import Spread, spread_of

OVERLOAD = 2.0


@dataclass(frozen=True, slots=True)
class Results:
    """One entry for each repeat; empty where a scenario was not asked for.

    capacity: answers a second in a closed loop, of which the loads are multiples.
    """

    alone: Sequence[Sides[Figures]]
    together: Sequence[Sides[Figures]]
    questions: Sequence[Times]
    cache: Sequence[Times]
    loads: Sequence[Sides[Sequence[LoadPoint]]]
    capacity: Sides[float] | None


LOADS_OF: tuple[tuple[str, Callable[[Sides[Sequence[LoadPoint]]], Sequence[LoadPoint]]], ...] = (
    (OURS, lambda sides: sides.ours),
    (NAIVE, lambda sides: sides.naive),
    (LITSERVE, lambda sides: sides.litserve),
)


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure that was to be reached: at least the limit, or at most, or below.

    measured: None where there was nothing to measure.
    """

    what: str
    measured: Spread | None
    relation: str
    limit: float

    @property
    def verdict(self) -> str:
        """Says whether the median reaches it."""
        if self.measured is None:
            return "not measured"
        value = self.measured.median
        within = value < self.limit or (self.relation == "at most" and value == self.limit)
        met = value >= self.limit if self.relation == "at least" else within
        return "met" if met else "**missed**"


def bars_of(results: Results) -> list[Bar]:
    """Gives all bars of the scenarios that were run; ratios are made repeat by repeat."""
    bars = []
    if results.alone:
        ratio = _ratio(results.alone, lambda side: side.ours.p50_s / side.naive.p50_s)
        bars.append(Bar(f"one at a time: p50, {OURS} / {NAIVE}", ratio, "at most", 1))
    if results.together:
        bars += _throughput_bars(results.together)
    if results.questions:
        ratio = spread_of(times.other_s / times.ours_s for times in results.questions)
        bars.append(Bar(f"questions about one picture: time, {NAIVE} / {OURS}", ratio, "at least", 5))
    if results.loads:
        bars += _overload_bars([sides.ours for sides in results.loads])
    return bars


def _throughput_bars(repeats: Sequence[Sides[Figures]]) -> Iterator[Bar]:
    by_naive = _ratio(repeats, lambda side: side.ours.per_s / side.naive.per_s)
    by_litserve = _ratio(repeats, lambda side: side.ours.per_s / side.litserve.per_s)
    for what, limit_naive, limit_litserve in (("floor", 3.5, 1.4), ("goal", 5, 2)):
        yield Bar(f"together: captions/s, {OURS} / {NAIVE}, {what}", by_naive, "at least", limit_naive)
        yield Bar(
            f"together: captions/s, {OURS} / {LITSERVE}, {what}", by_litserve, "at least", limit_litserve
        )
    p99_by_naive = _ratio(repeats, lambda side: side.ours.p99_s / side.naive.p99_s)
    p99_by_litserve = _ratio(repeats, lambda side: side.ours.p99_s / side.litserve.p99_s)
    yield Bar(f"together: p99, {OURS} / {NAIVE}", p99_by_naive, "below", 1)
    yield Bar(f"together: p99, {OURS} / {LITSERVE}", p99_by_litserve, "below", 1)


def _overload_bars(repeats: Sequence[Sequence[LoadPoint]]) -> Iterator[Bar]:
    overloads = [next(point for point in points if point.multiple == OVERLOAD) for points in repeats]
    peaks = [max(point.goodput_per_s for point in points) for points in repeats]
    kept = spread_of(point.goodput_per_s / peak for point, peak in zip(overloads, peaks, strict=True))
    yield Bar(f"goodput at {OVERLOAD:g} times the capacity / peak goodput", kept, "at least", 0.9)
    fast = [point.share_shed_fast for point in overloads if point.share_shed_fast is not None]
    yield Bar(
        f"shed within {FAST_SHED_S * 1000:.0f} ms / shed, at {OVERLOAD:g} times the capacity",
        spread_of(fast) if fast else None,
        "at least",
        0.95,
    )


def _ratio(repeats: Sequence[Sides[Figures]], ratio: Callable[[Sides[Figures]], float]) -> Spread:
    return spread_of(ratio(sides) for sides in repeats)
