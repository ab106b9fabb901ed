"""The service beside two others on the same weights: FastAPI with transformers, and LitServe.

    python -m benchmarks.serving [--repeats 3] [--threads 2] [--qformer bfloat16] [--max-waiting 32]
        [--seconds 30] [--only 1 2 5] [--quick] [--out FILE.md] [--plot FILE.png]

Needs the extra `bench`. Scenarios: 1 captions one at a time; 2 captions together; 3 ten questions about one
picture in one request; 4 ten questions one by one, the picture cached or not; 5 an open loop, up to twice the
capacity. --quick is a smoke run: its figures mean nothing. Linux only. Set an allocator for all three by
LD_PRELOAD, or for none.
"""

import argparse
import itertools
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks.machine import describe_machine, describe_versions
from benchmarks.serving.overload import measure_sides
from benchmarks.serving.plot import plot_loads
from benchmarks.serving.report import About, report
from benchmarks.serving.results import Results
from benchmarks.serving.scenarios import (
    QUICK,
    EqualTexts,
    Figures,
    Sizes,
    compare_texts,
    find_capacity,
    measure_cache,
    measure_captions,
    measure_questions,
)
from benchmarks.serving.servers import (
    Conditions,
    Contender,
    Sides,
    find_attention,
    start_litserve,
    start_naive,
    start_ours,
)

ALONE, TOGETHER, QUESTIONS, CACHE, LOADS = SCENARIOS = (1, 2, 3, 4, 5)
_QUICK_SECONDS = 6.0


@dataclass(frozen=True, slots=True)
class Started:
    """The servers, all paused. sweep: LitServe's captions a second at each batch_timeout."""

    sides: Sides[Contender]
    cached: Contender | None
    sweep: Sequence[tuple[float, float]]


def main() -> None:
    arguments = _parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves no server behind either
    sizes = QUICK if arguments.quick else Sizes()
    seeds = itertools.count()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        conditions = _prepare(Path(folder), arguments, sizes)
        started = _start(stack, conditions, arguments.only, sizes, seeds)
        _say("comparing texts")
        texts = compare_texts(started.sides, sizes, seeds)
        about = _describe(arguments, sizes, conditions.attention, started.sweep, texts)
        text = ""
        for results in _measure(started, arguments, sizes, seeds):
            text = _write(about, results, arguments.out, arguments.plot)
    print(text, end="")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The service beside FastAPI with transformers and LitServe.")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--qformer", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--max-waiting", type=int, default=32, help="BLIP2_MAX_WAITING")
    parser.add_argument("--seconds", type=float, help="of each load of scenario 5")
    parser.add_argument("--only", type=int, nargs="+", choices=SCENARIOS, default=SCENARIOS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="write the tables here too")
    parser.add_argument("--plot", type=Path, help="draw scenario 5 here")
    arguments = parser.parse_args()
    arguments.repeats = arguments.repeats or (1 if arguments.quick else 3)
    arguments.seconds = arguments.seconds or (_QUICK_SECONDS if arguments.quick else 30.0)
    if QUESTIONS in arguments.only and arguments.max_waiting < Sizes().num_questions:
        parser.error(f"--max-waiting {arguments.max_waiting} is less than the questions of scenario 3")
    if arguments.plot is not None and LOADS not in arguments.only:
        parser.error("--plot draws scenario 5, which --only leaves out")
    return arguments


def _prepare(folder: Path, arguments: argparse.Namespace, sizes: Sizes) -> Conditions:
    """Makes the checkpoint, in a process that takes torch's threads with it when it ends."""
    _say("making the checkpoint")
    directory = folder / "checkpoint"
    subprocess.run([sys.executable, "-m", "benchmarks.random_checkpoint", str(directory)], check=True)
    _say("finding the attention that is faster for generate")
    attention = find_attention(directory, arguments.threads, sizes.attention_batch)
    return Conditions(
        directory, folder, arguments.threads, arguments.qformer, arguments.max_waiting, attention
    )


def _start(
    stack: ExitStack, conditions: Conditions, only: Sequence[int], sizes: Sizes, seeds: Iterator[int]
) -> Started:
    _say("starting the servers")
    ours = start_ours(stack, conditions, cached=False)
    cached = start_ours(stack, conditions, cached=True) if CACHE in only else None
    naive = start_naive(stack, conditions)
    litserve, sweep = _choose_litserve(stack, conditions, sizes, seeds)
    return Started(Sides(ours, naive, litserve), cached, sweep)


def _choose_litserve(
    stack: ExitStack, conditions: Conditions, sizes: Sizes, seeds: Iterator[int]
) -> tuple[Contender, list[tuple[float, float]]]:
    """Tries each batch_timeout, and keeps the server of the best."""
    tried: list[tuple[float, Contender, ExitStack]] = []
    sweep: list[tuple[float, float]] = []
    for timeout_s in sizes.batch_timeouts_s:
        _say(f"LitServe with batch_timeout {timeout_s:g} s")
        own = stack.enter_context(ExitStack())
        litserve = start_litserve(own, conditions, timeout_s)
        find_capacity(litserve, replace(sizes, num_sweep=sizes.concurrency), seeds)  # warms up
        per_s = find_capacity(litserve, sizes, seeds)
        tried.append((per_s, litserve, own))
        sweep.append((timeout_s, per_s))
    tried.sort(key=lambda each: each[0])
    for _, _, own in tried[:-1]:
        own.close()
    return tried[-1][1], sweep


def _measure(
    started: Started, arguments: argparse.Namespace, sizes: Sizes, seeds: Iterator[int]
) -> Iterator[Results]:
    """Gives what is there once the closed loops are through, and again after each repeat of the open one."""
    sides, only, repeats = started.sides, arguments.only, range(arguments.repeats)
    _say("scenarios 1 to 4")
    alone = [measure_captions(sides, sizes.num_alone, 1, seeds) for _ in repeats if ALONE in only]
    together = [
        measure_captions(sides, sizes.num_together, sizes.concurrency, seeds)
        for _ in repeats
        if TOGETHER in only
    ]
    questions = [measure_questions(sides, sizes, seeds) for _ in repeats if QUESTIONS in only]
    cache = [
        measure_cache(started.cached, sides.ours, sizes, seeds) for _ in repeats if started.cached is not None
    ]
    results = Results(alone, together, questions, cache, [], None)
    yield results
    if LOADS in only:
        capacity = _capacity(together, sides, sizes, seeds)
        for repeat in repeats:
            _say(f"loads, repeat {repeat + 1}")
            points = measure_sides(sides, capacity, sizes, arguments.seconds, repeat, seeds)
            results = replace(results, loads=[*results.loads, points], capacity=capacity)
            yield results


def _capacity(
    together: Sequence[Sides[Figures]], sides: Sides[Contender], sizes: Sizes, seeds: Iterator[int]
) -> Sides[float]:
    """Gives the throughput of scenario 2, or measures it where that was left out."""
    if not together:
        return Sides(
            find_capacity(sides.ours, sizes, seeds),
            find_capacity(sides.naive, sizes, seeds),
            find_capacity(sides.litserve, sizes, seeds),
        )
    return Sides(
        median(one.ours.per_s for one in together),
        median(one.naive.per_s for one in together),
        median(one.litserve.per_s for one in together),
    )


def _describe(
    arguments: argparse.Namespace,
    sizes: Sizes,
    attention: str,
    sweep: Sequence[tuple[float, float]],
    texts: EqualTexts,
) -> About:
    return About(
        command=_command(arguments),
        machine=describe_machine(),
        versions=describe_versions(),
        num_threads=arguments.threads,
        qformer=arguments.qformer,
        max_waiting=arguments.max_waiting,
        seconds=arguments.seconds,
        sizes=sizes,
        attention=attention,
        sweep=sweep,
        texts=texts,
    )


def _write(about: About, results: Results, out: Path | None, plot: Path | None) -> str:
    """Gives the page, and writes it and the picture where they are wanted."""
    if plot is not None and results.loads:
        plot_loads(results, plot)
    text = report(about, results, plot.name if plot is not None and results.loads else None)
    if out is not None:
        out.write_text(text, encoding="utf-8")
    return text


def _command(arguments: argparse.Namespace) -> str:
    words = ["python -m benchmarks.serving"]
    for name in ("repeats", "threads", "qformer", "max-waiting", "seconds"):
        value = getattr(arguments, name.replace("-", "_"))
        words.append(f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}")
    if arguments.only != SCENARIOS:
        words.append(f"--only {' '.join(map(str, arguments.only))}")
    return " ".join([*words, *(["--quick"] if arguments.quick else [])])


def _say(what: str) -> None:
    print(f"· {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
