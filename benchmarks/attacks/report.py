"""Conditions of the run under attack, and its Markdown report."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from benchmarks.reporting import Check, check_table

MAX_SLOWDOWN = 3.0
MAX_RESIDENT_BYTES = 2 * 2**30  # less than the shipped manifests grant
MAX_KEPT_BYTES = 200_000_000


@dataclass(slots=True)
class Window:
    """A stretch of ordinary load, with attacks or without.

    seconds: of each ordinary request, by its path. statuses: of ordinary requests. peak_bytes: resident, of
    the service and its child processes, the most of all samples.
    """

    attacked: bool
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    statuses: Counter[int] = field(default_factory=Counter)
    peak_bytes: int = 0

    def percentile(self, share: float) -> float:
        ordered = sorted(chain.from_iterable(self.seconds.values()))
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(frozen=True, slots=True)
class AttackResult:
    """Results of the run. attacks: outcomes by attack. before, after: resident bytes when idle."""

    windows: Sequence[Window]
    attacks: Mapping[str, Counter[str]]
    before_bytes: int
    after_bytes: int
    num_restarts: int
    exit_code: int


def checks_of(result: AttackResult) -> list[Check]:
    """Evaluate all conditions."""
    alone, attacked = (_p99(result.windows, attacked=attacked) for attacked in (False, True))
    peak = max(window.peak_bytes for window in result.windows)
    statuses = sum((window.statuses for window in result.windows), Counter[int]())
    kept = result.after_bytes - result.before_bytes
    failed = {name: outcomes for name, outcomes in result.attacks.items() if any(map(_is_failure, outcomes))}
    return [
        Check(
            f"p99 of ordinary requests under attack is at most {MAX_SLOWDOWN:g} times that without",
            f"{attacked:.3f} s against {alone:.3f} s: {attacked / alone:.2f} times",
            attacked <= MAX_SLOWDOWN * alone,
        ),
        Check("every ordinary request is answered with 200", _listed(statuses), set(statuses) == {200}),
        Check("no attack is answered with a 5xx but 503 and 504", _listed(failed) or "none", not failed),
        Check(
            f"resident memory stays below {MAX_RESIDENT_BYTES / 2**30:g} GiB",
            f"{peak / 1e6:.0f} MB",
            peak < MAX_RESIDENT_BYTES,
        ),
        Check(
            f"memory when idle is back within {MAX_KEPT_BYTES / 1e6:.0f} MB",
            f"{result.before_bytes / 1e6:.0f} MB, then {result.after_bytes / 1e6:.0f} MB",
            kept <= MAX_KEPT_BYTES,
        ),
        Check("the process is never restarted", f"{result.num_restarts} restarts", result.num_restarts == 0),
        Check("exit code after SIGTERM is 0", str(result.exit_code), result.exit_code == 0),
    ]


def attack_report(command: str, about: str, result: AttackResult) -> str:
    """Return the Markdown report."""
    return "\n".join(_lines(command, about, result)) + "\n"


def _lines(command: str, about: str, result: AttackResult) -> Iterator[str]:
    yield f"# The service under attack\n\n`{command}`: {about}\n"
    yield from check_table(checks_of(result))
    paths = sorted(result.windows[0].seconds)
    largest = "".join(f" largest of {path}, s |" for path in paths)
    yield f"\n| window | ordinary requests | p50, s | p99, s |{largest} peak of resident memory, MB |"
    yield "|---" * (5 + len(paths)) + "|"
    for window in result.windows:
        seconds = (window.percentile(0.5), window.percentile(0.99), *(max(window.seconds[p]) for p in paths))
        cells = (
            "attacked" if window.attacked else "alone",
            sum(map(len, window.seconds.values())),
            *(f"{value:.3f}" for value in seconds),
            f"{window.peak_bytes / 1e6:.0f}",
        )
        yield f"| {' | '.join(map(str, cells))} |"
    yield "\n| attack | outcomes |"
    yield "|---|---|"
    for name, outcomes in result.attacks.items():
        yield f"| {name} | {_listed(outcomes)} |"


def _p99(windows: Sequence[Window], *, attacked: bool) -> float:
    return statistics.median(window.percentile(0.99) for window in windows if window.attacked is attacked)


def _listed(counts: Mapping[Any, object]) -> str:
    return ", ".join(f"{count} of {name}" for name, count in counts.items())


def _is_failure(outcome: str) -> bool:
    return outcome.startswith("5") and outcome not in ("503", "504")
