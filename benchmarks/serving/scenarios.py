"""The closed-loop scenarios: requests, servers and figures of each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.serving.load import LoadError, Outcome, Run
from benchmarks.serving.requests import (
    Request,
    caption_request,
    make_questions,
    question_request,
    questions_request,
)
from benchmarks.serving.servers import PerServer, Server


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of requests; multiples: loads of the open loop, as multiples of the capacity."""

    num_alone: int = 12
    num_together: int = 64
    concurrency: int = 16
    num_images: int = 3
    num_questions: int = 10
    num_compared: int = 16
    num_sweep: int = 48
    batch_timeouts_s: tuple[float, ...] = (0.01, 0.05, 0.2)
    attention_batch: int = 16
    multiples: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9, 1.2, 1.5, 2.0)
    max_multiple_unbounded: float = 1.2


QUICK = Sizes(
    num_alone=3,
    num_together=8,
    concurrency=4,
    num_images=1,
    num_compared=4,
    num_sweep=8,
    batch_timeouts_s=(0.05,),
    attention_batch=2,
    multiples=(0.5, 1.2, 2.0),
)


@dataclass(frozen=True, slots=True)
class Figures:
    """Throughput and latency percentiles of the answered requests of one closed loop."""

    per_s: float
    p50_s: float
    p95_s: float
    p99_s: float


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds for the same questions in two ways; the first is the one that should be faster."""

    first_s: float
    second_s: float


@dataclass(frozen=True, slots=True)
class EqualTexts:
    """Number of captions equal to those of transformers, generated one at a time."""

    num_captions: int
    service: int
    litserve: int


def compare_texts(servers: PerServer[Server], sizes: Sizes, seeds: Iterator[int]) -> EqualTexts:
    """Request the same captions from all servers, which also warms them up."""
    requests = _captions(sizes.num_compared, seeds)
    reference = _answered(servers.fastapi, requests, sizes.concurrency)
    service = _answered(servers.service, requests, sizes.concurrency)
    litserve = _answered(servers.litserve, requests, sizes.concurrency)
    return EqualTexts(len(requests), _num_equal(service, reference), _num_equal(litserve, reference))


def measure_captions(
    servers: PerServer[Server], count: int, concurrency: int, seeds: Iterator[int]
) -> PerServer[Figures]:
    """Request the same captions from each server in turn."""
    requests = _captions(count, seeds)
    return PerServer(
        figures_of(_answered(servers.service, requests, concurrency)),
        figures_of(_answered(servers.fastapi, requests, concurrency)),
        figures_of(_answered(servers.litserve, requests, concurrency)),
    )


def measure_questions(servers: PerServer[Server], sizes: Sizes, seeds: Iterator[int]) -> Times:
    """Ask several questions per image: the service in one request, FastAPI in one request each."""
    together, apart = [], []
    for seed in [next(seeds) for _ in range(sizes.num_images)]:
        questions = make_questions(seed, sizes.num_questions)
        together.append(questions_request(seed, questions))
        apart += [question_request(seed, question) for question in questions]
    return Times(
        _answered(servers.service, together, 1).seconds, _answered(servers.fastapi, apart, 1).seconds
    )


def measure_cache(cached: Server, uncached: Server, sizes: Sizes, seeds: Iterator[int]) -> Times:
    """Ask questions one by one: about cached images, then each about a new image.

    Raise LoadError if the cache flags of the responses are not those.
    """
    first, repeated, unseen = [], [], []
    for seed in [next(seeds) for _ in range(sizes.num_images)]:
        questions = make_questions(seed, sizes.num_questions + 1)
        first.append(question_request(seed, questions[0]))
        repeated += [question_request(seed, question) for question in questions[1:]]
        # Without a cache too, the service shares an image between requests that overlap: a new one each time.
        unseen += [question_request(next(seeds), question) for question in questions[1:]]
    _answered(cached, first, 1)
    hits, misses = _answered(cached, repeated, 1), _answered(uncached, unseen, 1)
    if not all(result.image_cached for result in hits.results):
        raise LoadError("an image of an earlier request is not in the cache")
    if any(result.image_cached for result in misses.results):
        raise LoadError("a new image is reported as cached")
    return Times(hits.seconds, misses.seconds)


def find_capacity(server: Server, sizes: Sizes, seeds: Iterator[int]) -> float:
    """Compute the responses per second in a closed loop."""
    requests = _captions(sizes.num_sweep, seeds)
    return figures_of(_answered(server, requests, sizes.concurrency)).per_s


def figures_of(run: Run) -> Figures:
    """Compute throughput and latency percentiles of a run."""
    p50_s, p95_s, p99_s = percentiles(run.latencies_s(Outcome.ANSWERED))
    return Figures(run.count(Outcome.ANSWERED) / run.seconds, p50_s, p95_s, p99_s)


def percentiles(latencies_s: Sequence[float]) -> tuple[float, float, float]:
    """Compute the 50th, 95th and 99th percentiles of a non-empty sequence."""
    p50, p95, p99 = np.percentile(latencies_s, (50, 95, 99))
    return float(p50), float(p95), float(p99)


def _captions(count: int, seeds: Iterator[int]) -> list[Request]:
    return [caption_request(next(seeds)) for _ in range(count)]


def _answered(server: Server, requests: Sequence[Request], concurrency: int) -> Run:
    run = server.run_closed(requests, concurrency)
    if run.count(Outcome.ANSWERED) != len(requests):
        raise LoadError("a request of a closed loop was not answered; raise --max-waiting")
    return run


def _num_equal(run: Run, reference: Run) -> int:
    return sum(one.texts == other.texts for one, other in zip(run.results, reference.results, strict=True))
