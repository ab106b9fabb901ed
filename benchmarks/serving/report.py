"""The page that `serving.py` writes: bars, tables, and how they came about."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.serving.overload import LoadPoint
from benchmarks.serving.results import LOADS_OF, Results, bars_of
from benchmarks.serving.scenarios import EqualTexts, Figures, Sizes, Times
from benchmarks.serving.servers import LITSERVE, LITSERVE_BATCH, NAIVE, OURS, Sides
from benchmarks.spread import median_of, spread_of


@dataclass(frozen=True, slots=True)
class About:
    """How the figures came about. sweep: LitServe's captions a second at each batch_timeout, in seconds."""

    command: str
    machine: str
    versions: str
    num_threads: int
    qformer: str
    max_waiting: int
    seconds: float
    sizes: Sizes
    attention: str
    sweep: Sequence[tuple[float, float]]
    texts: EqualTexts


def report(about: About, results: Results, picture: str | None) -> str:
    """Gives the page as Markdown; picture: the file name of the plot, where there is one."""
    parts = [_heading(about), _bars(results)]
    if results.alone:
        title = f"Captions, one at a time ({about.sizes.num_alone} in each repeat)"
        parts.append(_closed_loops(title, results.alone))
    if results.together:
        title = f"Captions, {about.sizes.concurrency} callers ({about.sizes.num_together} in each repeat)"
        parts.append(_closed_loops(title, results.together))
    if results.questions or results.cache:
        parts.append(_questions(about, results))
    if results.loads and results.capacity is not None:
        parts.append(_loads(about, results, results.capacity))
    if picture is not None:
        parts.append([f"![Latency and answers by load]({picture})"])
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _heading(about: About) -> list[str]:
    sweep = ", ".join(f"{timeout_s:g} s: {per_s:.2f}" for timeout_s, per_s in about.sweep)
    best_s = max(about.sweep, key=lambda pair: pair[1])[0]
    texts = about.texts
    return [
        f"# {OURS.capitalize()} beside {NAIVE} and {LITSERVE}",
        "",
        f"`{about.command}`: {about.machine}; {about.versions}.",
        "",
        f"All on one random checkpoint (ViT-B, OPT-125M) in bfloat16, threads: {about.num_threads} each, in "
        "processes of their own, measured in turn while the others are stopped, by one client. Every caption "
        "has 20 new tokens of 5 beams, every request a picture of its own.",
        "",
        f"- {OURS}: `python -m service`, Q-Former in {about.qformer}, no cache, at most {about.max_waiting} "
        "waiting.",
        f"- {NAIVE}: `generate` of transformers, one request at a time, in async handlers; {about.attention} "
        "attention, the faster one.",
        f"- {LITSERVE}: `generate` on batches of up to {LITSERVE_BATCH}, one worker, the same attention; "
        f"batch_timeout {best_s:g} s, the best (captions/s with {sweep}).",
        f"- Of {texts.num_captions} captions, {texts.ours} of {OURS} and {texts.litserve} of {LITSERVE} are "
        f"to the letter those of {NAIVE}; all have the length asked for.",
        "",
        "In each repeat the servers take turns. Figures are medians of the repeats; ratios are made repeat "
        "by repeat: median (least, most).",
    ]


def _bars(results: Results) -> list[str]:
    bars = bars_of(results)
    verdicts = [bar.verdict for bar in bars]
    return [
        "## Bars",
        "",
        f"{verdicts.count('met')} of {len(bars)} met.",
        "",
        "| | measured | bar | |",
        "|---|---|---|---|",
        *(
            f"| {bar.what} | {bar.measured or '–'} | {bar.relation} {bar.limit:g} | {bar.verdict} |"
            for bar in bars
        ),
    ]


def _closed_loops(title: str, repeats: Sequence[Sides[Figures]]) -> list[str]:
    rows = [f"## {title}", "", "| | captions/s | p50, s | p95, s | p99, s |", "|---|---|---|---|---|"]
    for name, figures in (
        (OURS, [sides.ours for sides in repeats]),
        (NAIVE, [sides.naive for sides in repeats]),
        (LITSERVE, [sides.litserve for sides in repeats]),
    ):
        columns = [
            median_of(getattr(one, field) for one in figures)
            for field in ("per_s", "p50_s", "p95_s", "p99_s")
        ]
        rows.append(f"| {name} | " + " | ".join(_number(value) for value in columns) + " |")
    return rows


def _questions(about: About, results: Results) -> list[str]:
    sizes = about.sizes
    rows = [
        f"## {sizes.num_questions} questions about a picture ({sizes.num_pictures} pictures in each repeat)",
        "",
        "| | s a picture | the other, s a picture | |",
        "|---|---|---|---|",
    ]
    for name, repeats, figure in (
        (f"all in one request; {NAIVE} one by one", results.questions, _times_faster),
        ("one by one, the picture cached; a new one each time", results.cache, _time_saved),
    ):
        if repeats:
            ours_s, other_s = (
                median_of(getattr(times, field) / sizes.num_pictures for times in repeats)
                for field in ("ours_s", "other_s")
            )
            rows.append(f"| {name} | {_number(ours_s)} | {_number(other_s)} | {figure(repeats)} |")
    return rows


def _times_faster(repeats: Sequence[Times]) -> str:
    return f"{spread_of(times.other_s / times.ours_s for times in repeats)} times the time"


def _time_saved(repeats: Sequence[Times]) -> str:
    return f"{spread_of(1 - times.ours_s / times.other_s for times in repeats)} of the time saved"


def _loads(about: About, results: Results, capacity: Sides[float]) -> list[str]:
    lag_s = max(point.max_lag_s for sides in results.loads for side in _all(sides) for point in side)
    rows = [
        f"## Load that comes regardless, {about.seconds:g} s each",
        "",
        f"Poisson arrivals, at multiples of each server's own closed-loop throughput ({OURS} "
        f"{capacity.ours:.2f}/s, {NAIVE} {capacity.naive:.2f}/s, {LITSERVE} {capacity.litserve:.2f}/s). "
        "Latency counts from when a request was due. Answers/s: once the first third of the time is over. "
        "Left: not answered some time after the last arrival. The client sent no request later than "
        f"{lag_s * 1000:.0f} ms.",
        "",
        "| | load | offered/s | answers/s | p50, s | p95, s | p99, s | shed | told so, p95, ms | left |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, select in LOADS_OF:
        for points in zip(*(select(sides) for sides in results.loads), strict=True):
            rows.append(_load_row(name, points))
    return rows


def _all(sides: Sides[Sequence[LoadPoint]]) -> list[Sequence[LoadPoint]]:
    return [select(sides) for _, select in LOADS_OF]


def _load_row(name: str, points: Sequence[LoadPoint]) -> str:
    shed_p95_s = median_of(point.shed_p95_s for point in points)
    cells = [
        name,
        f"{points[0].multiple:g}",
        _number(points[0].offered_per_s),
        *(
            _number(median_of(getattr(point, field) for point in points))
            for field in ("goodput_per_s", "p50_s", "p95_s", "p99_s")
        ),
        f"{median_of(point.share_shed for point in points) or 0:.0%}",
        "–" if shed_p95_s is None else f"{shed_p95_s * 1000:.0f}",
        str(sum(point.num_left for point in points)),
    ]
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
