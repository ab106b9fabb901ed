"""Parts of every report: the machine, the versions, and statistics over repeats."""

import os
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("torch", "transformers", "fastapi", "uvicorn", "uvloop", "litserve")


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, minimum and maximum over the repeats."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f}, {self.most:.2f})"


@dataclass(frozen=True, slots=True)
class Check:
    """One condition of a run."""

    name: str
    measured: str
    passed: bool


def check_table(conditions: Iterable[Check]) -> Iterator[str]:
    """Yield the lines of a Markdown table of conditions."""
    yield "| condition | measured | |"
    yield "|---|---|---|"
    for check in conditions:
        yield f"| {check.name} | {check.measured} | {'passed' if check.passed else '**failed**'} |"


def spread_of(values: Iterable[float]) -> Spread:
    """Compute the spread of at least one value."""
    listed = list(values)
    return Spread(statistics.median(listed), min(listed), max(listed))


def median_of(values: Iterable[float | None]) -> float | None:
    """Compute the median, ignoring None; return None if no value remains."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def describe_machine() -> str:
    """Return the CPU, the number of cores, and the allocator that child processes inherit."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "a CPU")
    return f"{name}, {os.cpu_count()} cores, allocator {describe_allocator()}"


def describe_allocator() -> str:
    """Return the file name of the preloaded allocator, or "glibc's"."""
    return Path(os.environ["LD_PRELOAD"]).name if "LD_PRELOAD" in os.environ else "glibc's"


def describe_versions() -> str:
    """Return the versions of the packages that the servers use."""
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"no {name}")
    return ", ".join(versions)
