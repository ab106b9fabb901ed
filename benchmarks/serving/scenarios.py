"""The closed loops: what is asked of which server, and what is kept of the answers."""

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
from benchmarks.serving.servers import Contender, Sides


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is asked. multiples: of the capacity, offered to ours in the open loop."""

    num_alone: int = 12
    num_together: int = 64
    concurrency: int = 16
    num_pictures: int = 3
    num_questions: int = 10
    num_compared: int = 16
    num_sweep: int = 48
    batch_timeouts_s: tuple[float, ...] = (0.01, 0.05, 0.2)
    attention_batch: int = 16
    multiples: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9, 1.2, 1.5, 2.0)
    most_for_peers: float = 1.2


QUICK = Sizes(
    num_alone=3,
    num_together=8,
    concurrency=4,
    num_pictures=1,
    num_compared=4,
    num_sweep=8,
    batch_timeouts_s=(0.05,),
    attention_batch=2,
    multiples=(0.5, 1.2, 2.0),
)


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one closed loop; the latencies are those of the answered, in seconds."""

    per_s: float
    p50_s: float
    p95_s: float
    p99_s: float


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds that the same questions took ours and another server."""

    ours_s: float
    other_s: float


@dataclass(frozen=True, slots=True)
class EqualTexts:
    """How many of so many captions are to the letter those of transformers, one at a time."""

    num_captions: int
    ours: int
    litserve: int


def compare_texts(sides: Sides[Contender], sizes: Sizes, seeds: Iterator[int]) -> EqualTexts:
    """Asks all servers for the same captions; warms them up, too."""
    requests = _captions(sizes.num_compared, seeds)
    reference = _answered(sides.naive, requests, sizes.concurrency)
    ours = _answered(sides.ours, requests, sizes.concurrency)
    litserve = _answered(sides.litserve, requests, sizes.concurrency)
    return EqualTexts(len(requests), _num_equal(ours, reference), _num_equal(litserve, reference))


def measure_captions(
    sides: Sides[Contender], count: int, concurrency: int, seeds: Iterator[int]
) -> Sides[Figures]:
    """Has each server in turn caption the same pictures."""
    requests = _captions(count, seeds)
    return Sides(
        figures_of(_answered(sides.ours, requests, concurrency)),
        figures_of(_answered(sides.naive, requests, concurrency)),
        figures_of(_answered(sides.litserve, requests, concurrency)),
    )


def measure_questions(sides: Sides[Contender], sizes: Sizes, seeds: Iterator[int]) -> Times:
    """Asks several questions about each picture: ours in one request, FastAPI's in one after the other."""
    together, apart = [], []
    for seed in [next(seeds) for _ in range(sizes.num_pictures)]:
        questions = make_questions(seed, sizes.num_questions)
        together.append(questions_request(seed, questions))
        apart += [question_request(seed, question) for question in questions]
    return Times(_answered(sides.ours, together, 1).seconds, _answered(sides.naive, apart, 1).seconds)


def measure_cache(cached: Contender, uncached: Contender, sizes: Sizes, seeds: Iterator[int]) -> Times:
    """Asks one question after the other: about pictures that are known, and each about one that is not.

    Raises LoadError where the cache was not what it should be.
    """
    first, later, strange = [], [], []
    for seed in [next(seeds) for _ in range(sizes.num_pictures)]:
        questions = make_questions(seed, sizes.num_questions + 1)
        first.append(question_request(seed, questions[0]))
        later += [question_request(seed, question) for question in questions[1:]]
        # A picture of a moment ago may still be at hand where nothing is cached: a new one each time.
        strange += [question_request(next(seeds), question) for question in questions[1:]]
    _answered(cached, first, 1)
    known, unknown = _answered(cached, later, 1), _answered(uncached, strange, 1)
    if not all(reply.image_cached for reply in known.replies):
        raise LoadError("a picture that was asked about before is not in the cache")
    if any(reply.image_cached for reply in unknown.replies):
        raise LoadError("a picture that was never sent before is said to be cached")
    return Times(known.seconds, unknown.seconds)


def find_capacity(contender: Contender, sizes: Sizes, seeds: Iterator[int]) -> float:
    """Gives the answers a second in a closed loop."""
    requests = _captions(sizes.num_sweep, seeds)
    return figures_of(_answered(contender, requests, sizes.concurrency)).per_s


def figures_of(run: Run) -> Figures:
    p50_s, p95_s, p99_s = percentiles(run.latencies_s(Outcome.ANSWERED))
    return Figures(run.count(Outcome.ANSWERED) / run.seconds, p50_s, p95_s, p99_s)


def percentiles(latencies_s: Sequence[float]) -> tuple[float, float, float]:
    """Gives the 50th, 95th and 99th; they must not be empty."""
    p50, p95, p99 = np.percentile(latencies_s, (50, 95, 99))
    return float(p50), float(p95), float(p99)


def _captions(count: int, seeds: Iterator[int]) -> list[Request]:
    return [caption_request(next(seeds)) for _ in range(count)]


def _answered(contender: Contender, requests: Sequence[Request], concurrency: int) -> Run:
    run = contender.run_closed(requests, concurrency)
    if run.count(Outcome.ANSWERED) != len(requests):
        raise LoadError("a request of a closed loop was not answered; let more of them wait")
    return run


def _num_equal(run: Run, reference: Run) -> int:
    return sum(one.texts == other.texts for one, other in zip(run.replies, reference.replies, strict=True))
