"""The open-loop scenario: Poisson arrivals at multiples of each server's capacity."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.serving.load import Outcome, Run, poisson_arrivals
from benchmarks.serving.requests import caption_request
from benchmarks.serving.scenarios import Sizes, percentiles
from benchmarks.serving.servers import PerServer, Server

FAST_REJECTION_S = 0.05
# Share of each run in which the queue of an idle server fills up; excluded from the goodput.
_RAMP = 1 / 3
_GRACE_S = 10.0
_GRACE_REQUESTS = 64  # after the last arrival, this many waiting requests have the time to finish
_SEED = 20


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """Figures of one server under one load; None: no such request.

    goodput_per_s: responses per second after the ramp. share_rejected_fast: share of the rejections that
    came within 50 ms. num_abandoned: requests without a response in time. max_lag_s: delay of the client.
    """

    multiple: float
    offered_per_s: float
    num_sent: int
    goodput_per_s: float
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None
    share_rejected: float
    rejected_p95_s: float | None
    share_rejected_fast: float | None
    num_abandoned: int
    max_lag_s: float


def measure_loads(
    servers: PerServer[Server],
    capacity: PerServer[float],
    sizes: Sizes,
    seconds: float,
    repeat: int,
    seeds: Iterator[int],
) -> PerServer[Sequence[LoadPoint]]:
    """Offer each server multiples of its capacity; smaller ones to the servers with an unbounded queue."""
    of_unbounded = [multiple for multiple in sizes.multiples if multiple <= sizes.max_multiple_unbounded]
    return PerServer(
        _measure_loads(servers.service, capacity.service, sizes.multiples, seconds, repeat, seeds),
        _measure_loads(servers.fastapi, capacity.fastapi, of_unbounded, seconds, repeat, seeds),
        _measure_loads(servers.litserve, capacity.litserve, of_unbounded, seconds, repeat, seeds),
    )


def _measure_loads(
    server: Server,
    capacity_per_s: float,
    multiples: Sequence[float],
    seconds: float,
    repeat: int,
    seeds: Iterator[int],
) -> list[LoadPoint]:
    """Offer each load for `seconds`; the seed of the arrivals is the same for all servers and loads."""
    points = []
    for multiple in multiples:
        rate = multiple * capacity_per_s
        arrivals_s = poisson_arrivals(rate, seconds, _SEED + repeat)
        requests = [caption_request(next(seeds)) for _ in arrivals_s]
        end_s = seconds + _GRACE_S + _GRACE_REQUESTS / capacity_per_s
        points.append(_point_of(server.run_open(requests, arrivals_s, end_s), multiple, rate, seconds))
    return points


def _share_fast(latencies_s: Sequence[float]) -> float:
    return sum(latency_s <= FAST_REJECTION_S for latency_s in latencies_s) / len(latencies_s)


def _point_of(run: Run, multiple: float, rate: float, seconds: float) -> LoadPoint:
    answered_s, rejected_s = run.latencies_s(Outcome.ANSWERED), run.latencies_s(Outcome.REJECTED)
    p50_s, p95_s, p99_s = percentiles(answered_s) if answered_s else (None, None, None)
    return LoadPoint(
        multiple=multiple,
        offered_per_s=rate,
        num_sent=len(run.results),
        goodput_per_s=run.answered_per_s(since_s=_RAMP * seconds, until_s=seconds),
        p50_s=p50_s,
        p95_s=p95_s,
        p99_s=p99_s,
        share_rejected=len(rejected_s) / max(1, len(run.results)),
        rejected_p95_s=percentiles(rejected_s)[1] if rejected_s else None,
        share_rejected_fast=_share_fast(rejected_s) if rejected_s else None,
        num_abandoned=run.count(Outcome.ABANDONED),
        max_lag_s=max((result.lag_s for result in run.results), default=0.0),
    )
