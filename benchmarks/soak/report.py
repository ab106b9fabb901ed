"""Whether the soak test was passed, and its page."""

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.soak.client import Tally

MAX_RSS_GROWTH = 0.1
MORE_THREADS = 4
MORE_DESCRIPTORS = 4
_NUM_NEAREST = 3


@dataclass(frozen=True, slots=True)
class Sample:
    """The service at one moment; the counts are the client's, so far. at_s: since the traffic began."""

    at_s: float
    sent: int
    answered: int
    refused: int
    shed: int
    expired: int
    abandoned: int
    rss_bytes: int
    threads: int
    descriptors: int
    waiting: int
    running: int

    def row(self, when: str = "") -> str:
        cells = (
            f"{self.at_s:.0f}{when}",
            self.sent,
            self.answered,
            self.refused,
            self.shed,
            self.expired,
            self.abandoned,
            f"{self.rss_bytes / 1e6:.0f}",
            self.threads,
            self.descriptors,
            self.waiting,
            self.running,
        )
        return f"| {' | '.join(map(str, cells))} |"


@dataclass(frozen=True, slots=True)
class Soaked:
    """All that was seen. samples: under load. warm, final: at rest, after the warm-up and at the end.

    counted: what the service says it answered, by status. settled_s: when memory should have stopped growing.
    """

    tally: Tally
    counted: Counter[int]
    samples: Sequence[Sample]
    warm: Sample
    final: Sample
    settled_s: float
    exit_code: int


@dataclass(frozen=True, slots=True)
class Check:
    """One condition of passing."""

    what: str
    seen: str
    passed: bool


def checks_of(soaked: Soaked) -> list[Check]:
    """Judges what was seen; the test is passed where all are."""
    tally, warm, final = soaked.tally, soaked.warm, soaked.final
    unseen = soaked.counted - tally.statuses
    missing = tally.statuses - soaked.counted
    failed = {
        status: count for status, count in (tally.statuses | soaked.counted).items() if _is_failure(status)
    }
    settled, end = _rss_near(soaked.samples, soaked.settled_s), _rss_near(soaked.samples, final.at_s)
    growth = end / settled - 1
    return [
        Check("sent = answered + refused + shed + expired + abandoned", f"{tally.sent} sent", tally.adds_up),
        Check(
            "the service counted the same, and the abandoned on top",
            f"{unseen.total()} more, {tally.abandoned} abandoned; {missing.total()} less",
            not missing and unseen.total() == tally.abandoned,
        ),
        Check("every answer is the one that was due", f"{len(tally.surprises)} are not", not tally.surprises),
        Check(
            "no 5xx but 503 and 504",
            ", ".join(f"{n} of {s}" for s, n in failed.items()) or "none",
            not failed,
        ),
        Check(
            "nothing waits or runs at rest",
            f"{final.waiting} waiting, {final.running} running",
            final.waiting == final.running == 0,
        ),
        Check(
            f"threads at rest: at most {MORE_THREADS} more than after the warm-up",
            f"{warm.threads}, then {final.threads}",
            final.threads <= warm.threads + MORE_THREADS,
        ),
        Check(
            f"descriptors at rest: at most {MORE_DESCRIPTORS} more than after the warm-up",
            f"{warm.descriptors}, then {final.descriptors}",
            final.descriptors <= warm.descriptors + MORE_DESCRIPTORS,
        ),
        Check(
            f"RSS grows by less than {MAX_RSS_GROWTH:.0%} after {soaked.settled_s:.0f} s",
            f"{settled / 1e6:.0f} MB, then {end / 1e6:.0f} MB ({growth:+.1%})",
            growth < MAX_RSS_GROWTH,
        ),
        Check("SIGTERM ends the process with 0", f"{soaked.exit_code}", soaked.exit_code == 0),
    ]


def soak_report(command: str, about: str, soaked: Soaked) -> str:
    """Gives the page as Markdown."""
    return "\n".join(_lines(command, about, soaked)) + "\n"


def _lines(command: str, about: str, soaked: Soaked) -> Iterator[str]:
    yield f"# The service under mixed traffic\n\n`{command}`: {about}\n"
    yield "| condition | seen | |"
    yield "|---|---|---|"
    for check in checks_of(soaked):
        yield f"| {check.what} | {check.seen} | {'passed' if check.passed else '**failed**'} |"
    yield ""
    for surprise in soaked.tally.surprises:
        yield f"- {surprise}"
    statuses = ", ".join(f"{count} of {status}" for status, count in sorted(soaked.tally.statuses.items()))
    yield f"\nStatuses: {statuses}.\n"
    yield (
        "| time, s | sent | answered | refused | shed | expired | abandoned "
        "| RSS, MB | threads | descriptors | waiting | running |"
    )
    yield "|---" * 12 + "|"
    rows = [(sample, "") for sample in soaked.samples] + [(soaked.warm, ", at rest")]
    for sample, when in sorted(rows, key=lambda row: row[0].at_s):
        yield sample.row(when)
    yield soaked.final.row(", at rest")


def _rss_near(samples: Sequence[Sample], at_s: float) -> float:
    """Gives the median of the samples nearest to that time."""
    nearest = sorted(samples, key=lambda sample: abs(sample.at_s - at_s))[:_NUM_NEAREST]
    return statistics.median(sample.rss_bytes for sample in nearest)


def _is_failure(status: int) -> bool:
    return status >= 500 and status not in (503, 504)
