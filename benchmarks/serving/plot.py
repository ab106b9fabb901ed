"""Plot of latency and throughput over the offered load."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.reporting import median_of
from benchmarks.serving.overload import LoadPoint
from benchmarks.serving.results import LOADS_OF, Results

_COLOURS = ("tab:blue", "tab:orange", "tab:green")


def plot_loads(results: Results, path: Path) -> None:
    """Save the plot of the medians over at least one repeat."""
    with mpl.rc_context({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(9, 8), dpi=150, layout="constrained")
        latency, goodput = figure.subplots(2, 1, sharex=True)
        for (name, select), colour in zip(LOADS_OF, _COLOURS, strict=True):
            repeats = list(zip(*(select(per_server) for per_server in results.loads), strict=True))
            _draw(latency, goodput, repeats, name, colour)
        _label(latency, goodput)
        figure.savefig(path)


def _draw(latency: Axes, goodput: Axes, loads: Sequence[Sequence[LoadPoint]], name: str, colour: str) -> None:
    offered = [points[0].offered_per_s for points in loads]
    for field, style, label in (("p50_s", "-", f"{name}, p50"), ("p99_s", "--", f"{name}, p99")):
        latency.plot(offered, _medians(loads, field), style, marker="o", color=colour, label=label)
    goodput.plot(offered, _medians(loads, "goodput_per_s"), marker="o", color=colour, label=name)


def _medians(loads: Sequence[Sequence[LoadPoint]], field: str) -> list[float]:
    medians = (median_of(getattr(point, field) for point in points) for points in loads)
    return [float("nan") if median is None else median for median in medians]


def _label(latency: Axes, goodput: Axes) -> None:
    latency.set_yscale("log")
    latency.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    latency.yaxis.set_major_formatter("{x:g}")
    latency.yaxis.set_minor_formatter(NullFormatter())
    latency.set_ylabel("latency of answered requests, s")
    latency.legend(ncols=3, fontsize=10, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    goodput.axline((0, 0), slope=1, linestyle=":", color="gray", label="all answered")
    goodput.set_xlim(left=0)
    goodput.set_ylim(bottom=0)
    goodput.set_xlabel("offered load, requests/s")
    goodput.set_ylabel("answers, requests/s")
    goodput.legend(fontsize=9, loc="lower right")
