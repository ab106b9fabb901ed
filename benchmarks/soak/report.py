"""Conditions of the soak test, and its Markdown report."""

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.reporting import Check, check_table
from benchmarks.soak.client import Tally

MAX_RSS_GROWTH = 0.1
MAX_MORE_THREADS = 4
MAX_MORE_DESCRIPTORS = 4
_NUM_NEAREST = 3


@dataclass(frozen=True, slots=True)
class Sample:
    """Counts of the client and state of the process at one time; time_s: under load so far."""

    time_s: float
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
            f"{self.time_s:.0f}{when}",
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
class SoakResult:
    """Results of the soak test.

    samples: under load. warm, final: idle, after the warm-up and at the end. counted: responses by status, as
    the service counted them. steady_s: time after which memory should not grow.
    """

    tally: Tally
    counted: Counter[int]
    samples: Sequence[Sample]
    warm: Sample
    final: Sample
    steady_s: float
    exit_code: int


def checks_of(result: SoakResult) -> list[Check]:
    """Evaluate all conditions; the soak test passes if all of them do."""
    tally, warm, final = result.tally, result.warm, result.final
    extra = result.counted - tally.statuses
    missing = tally.statuses - result.counted
    failed = {
        status: count for status, count in (tally.statuses | result.counted).items() if _is_failure(status)
    }
    steady, end = _rss_near(result.samples, result.steady_s), _rss_near(result.samples, final.time_s)
    growth = end / steady - 1
    return [
        Check("sent = answered + refused + shed + expired + abandoned", f"{tally.sent} sent", tally.adds_up),
        Check(
            "the service counted the same, plus the abandoned",
            f"{extra.total()} more, {tally.abandoned} abandoned; {missing.total()} fewer",
            not missing and extra.total() == tally.abandoned,
        ),
        Check(
            "every response has its expected status", f"{len(tally.unexpected)} do not", not tally.unexpected
        ),
        Check(
            "no 5xx except 503 and 504",
            ", ".join(f"{n} of {s}" for s, n in failed.items()) or "none",
            not failed,
        ),
        Check(
            "no request waits or runs when idle",
            f"{final.waiting} waiting, {final.running} running",
            final.waiting == final.running == 0,
        ),
        Check(
            f"threads when idle: at most {MAX_MORE_THREADS} more than after the warm-up",
            f"{warm.threads}, then {final.threads}",
            final.threads <= warm.threads + MAX_MORE_THREADS,
        ),
        Check(
            f"descriptors when idle: at most {MAX_MORE_DESCRIPTORS} more than after the warm-up",
            f"{warm.descriptors}, then {final.descriptors}",
            final.descriptors <= warm.descriptors + MAX_MORE_DESCRIPTORS,
        ),
        Check(
            f"RSS grows by less than {MAX_RSS_GROWTH:.0%} after {result.steady_s:.0f} s",
            f"{steady / 1e6:.0f} MB, then {end / 1e6:.0f} MB ({growth:+.1%})",
            growth < MAX_RSS_GROWTH,
        ),
        Check("exit code after SIGTERM is 0", f"{result.exit_code}", result.exit_code == 0),
    ]


def soak_report(command: str, about: str, result: SoakResult) -> str:
    """Return the Markdown report."""
    return "\n".join(_lines(command, about, result)) + "\n"


def _lines(command: str, about: str, result: SoakResult) -> Iterator[str]:
    yield f"# The service under mixed traffic\n\n`{command}`: {about}\n"
    yield from check_table(checks_of(result))
    yield ""
    for description in result.tally.unexpected:
        yield f"- {description}"
    statuses = ", ".join(f"{count} of {status}" for status, count in sorted(result.tally.statuses.items()))
    yield f"\nStatuses: {statuses}.\n"
    yield (
        "| time, s | sent | answered | refused | shed | expired | abandoned "
        "| RSS, MB | threads | descriptors | waiting | running |"
    )
    yield "|---" * 12 + "|"
    rows = [(sample, "") for sample in result.samples] + [(result.warm, ", idle")]
    for sample, when in sorted(rows, key=lambda row: row[0].time_s):
        yield sample.row(when)
    yield result.final.row(", idle")


def _rss_near(samples: Sequence[Sample], time_s: float) -> float:
    """Compute the median RSS of the samples nearest to a time."""
    nearest = sorted(samples, key=lambda sample: abs(sample.time_s - time_s))[:_NUM_NEAREST]
    return statistics.median(sample.rss_bytes for sample in nearest)


def _is_failure(status: int) -> bool:
    return status >= 500 and status not in (503, 504)
