"""The open loop: requests that come whether or not the server keeps up, at multiples of its capacity."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.serving.load import Outcome, Run, poisson_arrivals
from benchmarks.serving.requests import caption_request
from benchmarks.serving.scenarios import Sizes, percentiles
from benchmarks.serving.servers import Contender, Sides

FAST_SHED_S = 0.05
# Of a point's time, in which a server that was idle fills up: its answers are not in the goodput.
_RAMP = 1 / 3
_GRACE_S = 10.0
_GRACE_REQUESTS = 64  # as many as may be under way must have the time to be answered after the last arrival
_SEED = 20


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """One server under one load. goodput_per_s: answers a second once it is under way; None: there were none.

    share_shed_fast: of those shed, the share told within 50 ms. num_left: those the client gave up on.
    max_lag_s: how late the client sent a request, at most.
    """

    multiple: float
    offered_per_s: float
    num_sent: int
    goodput_per_s: float
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None
    share_shed: float
    shed_p95_s: float | None
    share_shed_fast: float | None
    num_left: int
    max_lag_s: float


def measure_sides(
    sides: Sides[Contender],
    capacity: Sides[float],
    sizes: Sizes,
    seconds: float,
    repeat: int,
    seeds: Iterator[int],
) -> Sides[Sequence[LoadPoint]]:
    """Has each server in turn meet multiples of its capacity; fewer, where its queue has no bound."""
    of_peers = [multiple for multiple in sizes.multiples if multiple <= sizes.most_for_peers]
    return Sides(
        _measure_loads(sides.ours, capacity.ours, sizes.multiples, seconds, repeat, seeds),
        _measure_loads(sides.naive, capacity.naive, of_peers, seconds, repeat, seeds),
        _measure_loads(sides.litserve, capacity.litserve, of_peers, seconds, repeat, seeds),
    )


def _measure_loads(
    contender: Contender,
    capacity_per_s: float,
    multiples: Sequence[float],
    seconds: float,
    repeat: int,
    seeds: Iterator[int],
) -> list[LoadPoint]:
    """Offers each load for so many seconds; the pattern of arrivals is the same for all servers and loads."""
    points = []
    for multiple in multiples:
        rate = multiple * capacity_per_s
        arrivals_s = poisson_arrivals(rate, seconds, _SEED + repeat)
        requests = [caption_request(next(seeds)) for _ in arrivals_s]
        end_s = seconds + _GRACE_S + _GRACE_REQUESTS / capacity_per_s
        points.append(_point_of(contender.run_open(requests, arrivals_s, end_s), multiple, rate, seconds))
    return points


def _point_of(run: Run, multiple: float, rate: float, seconds: float) -> LoadPoint:
    answered_s, shed_s = run.latencies_s(Outcome.ANSWERED), run.latencies_s(Outcome.SHED)
    p50_s, p95_s, p99_s = percentiles(answered_s) if answered_s else (None, None, None)
    return LoadPoint(
        multiple=multiple,
        offered_per_s=rate,
        num_sent=len(run.replies),
        goodput_per_s=run.answered_per_s(since_s=_RAMP * seconds, until_s=seconds),
        p50_s=p50_s,
        p95_s=p95_s,
        p99_s=p99_s,
        share_shed=len(shed_s) / max(1, len(run.replies)),
        shed_p95_s=percentiles(shed_s)[1] if shed_s else None,
        share_shed_fast=sum(one <= FAST_SHED_S for one in shed_s) / len(shed_s) if shed_s else None,
        num_left=run.count(Outcome.ABANDONED),
        max_lag_s=max((reply.lag_s for reply in run.replies), default=0.0),
    )
