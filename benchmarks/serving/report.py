"""The Markdown report: conditions, targets and tables."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.reporting import median_of, spread_of
from benchmarks.serving.overload import LoadPoint
from benchmarks.serving.results import LOADS_OF, Results, targets_of
from benchmarks.serving.scenarios import EqualTexts, Figures, Sizes, Times
from benchmarks.serving.servers import FASTAPI, LITSERVE, LITSERVE_BATCH, SERVICE, PerServer


@dataclass(frozen=True, slots=True)
class About:
    """Conditions of the measurement; timeout_sweep: batch_timeout in seconds and captions/s of LitServe."""

    command: str
    machine: str
    versions: str
    num_threads: int
    qformer: str
    max_waiting: int
    seconds: float
    sizes: Sizes
    attention: str
    timeout_sweep: Sequence[tuple[float, float]]
    texts: EqualTexts


def report(about: About, results: Results, plot: str | None) -> str:
    """Return the report as Markdown; plot: file name of the plot, if any."""
    sections = [_heading(about), _targets(results)]
    if results.alone:
        title = f"Captions, one at a time ({about.sizes.num_alone} in each repeat)"
        sections.append(_closed_loops(title, results.alone))
    if results.together:
        title = f"Captions, {about.sizes.concurrency} callers ({about.sizes.num_together} in each repeat)"
        sections.append(_closed_loops(title, results.together))
    if results.questions or results.cache:
        sections.append(_questions(about, results))
    if results.loads and results.capacity is not None:
        sections.append(_loads(about, results, results.capacity))
    if plot is not None:
        sections.append([f"![Latency and answers by load]({plot})"])
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _heading(about: About) -> list[str]:
    timeout_sweep = ", ".join(f"{timeout_s:g} s: {per_s:.2f}" for timeout_s, per_s in about.timeout_sweep)
    best_s = max(about.timeout_sweep, key=lambda pair: pair[1])[0]
    texts = about.texts
    return [
        f"# {SERVICE.capitalize()} compared with {FASTAPI} and {LITSERVE}",
        "",
        f"`{about.command}`: {about.machine}; {about.versions}.",
        "",
        f"All on one random checkpoint (ViT-B, OPT-125M) in bfloat16, threads: {about.num_threads} each, in "
        "separate processes, measured in turn while the others are stopped, by one client. Every caption has "
        "20 new tokens and 5 beams, every request its own image.",
        "",
        f"- {SERVICE}: `python -m service`, Q-Former in {about.qformer}, no cache, at most "
        f"{about.max_waiting} waiting.",
        f"- {FASTAPI}: `generate` of transformers, one request at a time, in async handlers; "
        f"{about.attention} attention, which was faster.",
        f"- {LITSERVE}: `generate` on batches of up to {LITSERVE_BATCH}, one worker, the same attention; "
        f"batch_timeout {best_s:g} s, the best (captions/s with {timeout_sweep}).",
        f"- Of {texts.num_captions} captions, {texts.service} of {SERVICE} and {texts.litserve} of "
        f"{LITSERVE} are identical to those of {FASTAPI}; all have the requested length.",
        "",
        "In each repeat the servers take turns. Figures are medians of the repeats; ratios are computed "
        "per repeat: median (least, most).",
    ]


def _targets(results: Results) -> list[str]:
    targets = targets_of(results)
    verdicts = [target.verdict for target in targets]
    return [
        "## Targets",
        "",
        f"{verdicts.count('met')} of {len(targets)} met.",
        "",
        "| | measured | target | |",
        "|---|---|---|---|",
        *(
            f"| {each.name} | {each.measured or '–'} | {each.relation} {each.limit:g} | {each.verdict} |"
            for each in targets
        ),
    ]


def _closed_loops(title: str, repeats: Sequence[PerServer[Figures]]) -> list[str]:
    rows = [f"## {title}", "", "| | captions/s | p50, s | p95, s | p99, s |", "|---|---|---|---|---|"]
    for name, figures in (
        (SERVICE, [per_server.service for per_server in repeats]),
        (FASTAPI, [per_server.fastapi for per_server in repeats]),
        (LITSERVE, [per_server.litserve for per_server in repeats]),
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
        f"## {sizes.num_questions} questions about an image ({sizes.num_images} images in each repeat)",
        "",
        "| | s per image | compared with, s per image | |",
        "|---|---|---|---|",
    ]
    for name, repeats, figure in (
        (f"all in one request; {FASTAPI} one by one", results.questions, _times_faster),
        ("one by one about a cached image; about a new image each", results.cache, _time_saved),
    ):
        if repeats:
            first_s, second_s = (
                median_of(getattr(times, field) / sizes.num_images for times in repeats)
                for field in ("first_s", "second_s")
            )
            rows.append(f"| {name} | {_number(first_s)} | {_number(second_s)} | {figure(repeats)} |")
    return rows


def _times_faster(repeats: Sequence[Times]) -> str:
    return f"{spread_of(times.second_s / times.first_s for times in repeats)} times as fast"


def _time_saved(repeats: Sequence[Times]) -> str:
    return f"{spread_of(1 - times.first_s / times.second_s for times in repeats)} of the time saved"


def _loads(about: About, results: Results, capacity: PerServer[float]) -> list[str]:
    lag_s = max(point.max_lag_s for loads in results.loads for points in _all(loads) for point in points)
    rows = [
        f"## Open loop, {about.seconds:g} s for each load",
        "",
        f"Poisson arrivals, at multiples of each server's own closed-loop throughput: "
        f"{SERVICE} {capacity.service:.2f}/s, {FASTAPI} {capacity.fastapi:.2f}/s, "
        f"{LITSERVE} {capacity.litserve:.2f}/s. "
        "Latency starts when a request is due. Answers/s: after the first third of the time. "
        "Abandoned: not answered in time after the last arrival. Maximal delay of the client: "
        f"{lag_s * 1000:.0f} ms.",
        "",
        "| | load | offered/s | answers/s | p50, s | p95, s | p99, s "
        "| rejected | rejection, p95, ms | abandoned |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, select in LOADS_OF:
        for points in zip(*(select(per_server) for per_server in results.loads), strict=True):
            rows.append(_load_row(name, points))
    return rows


def _all(per_server: PerServer[Sequence[LoadPoint]]) -> list[Sequence[LoadPoint]]:
    return [select(per_server) for _, select in LOADS_OF]


def _load_row(name: str, points: Sequence[LoadPoint]) -> str:
    rejected_p95_s = median_of(point.rejected_p95_s for point in points)
    cells = [
        name,
        f"{points[0].multiple:g}",
        _number(points[0].offered_per_s),
        *(
            _number(median_of(getattr(point, field) for point in points))
            for field in ("goodput_per_s", "p50_s", "p95_s", "p99_s")
        ),
        f"{median_of(point.share_rejected for point in points) or 0:.0%}",
        "–" if rejected_p95_s is None else f"{rejected_p95_s * 1000:.0f}",
        str(sum(point.num_abandoned for point in points)),
    ]
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
