"""Compare the service with FastAPI + transformers and with LitServe, on the same weights.

    python -m benchmarks.serving [--repeats 3] [--threads 2] [--qformer bfloat16] [--max-waiting 32]
        [--seconds 30] [--only 1 2 5] [--quick] [--out FILE.md] [--plot FILE.png]

Requires the extra `bench`, and Linux. Scenarios: 1 sequential captions; 2 concurrent captions; 3 ten
questions about one image in one request; 4 ten questions one by one, with and without a cached image; 5 an
open loop up to twice the capacity. --quick is a smoke test whose figures are meaningless. LD_PRELOAD sets the
allocator of all three servers.
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

from benchmarks.reporting import describe_machine, describe_versions
from benchmarks.serving.overload import measure_loads
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
    PerServer,
    Server,
    find_attention,
    start_fastapi,
    start_litserve,
    start_service,
)

ALONE, TOGETHER, QUESTIONS, CACHE, LOADS = SCENARIOS = (1, 2, 3, 4, 5)
_QUICK_SECONDS = 6.0


@dataclass(frozen=True, slots=True)
class Started:
    """The paused servers; timeout_sweep: batch_timeout in seconds and captions/s of LitServe."""

    servers: PerServer[Server]
    cached: Server | None
    timeout_sweep: Sequence[tuple[float, float]]


def main() -> None:
    arguments = _parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM stops the servers too
    sizes = QUICK if arguments.quick else Sizes()
    seeds = itertools.count()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        conditions = _prepare(Path(folder), arguments, sizes)
        started = _start(stack, conditions, arguments.only, sizes, seeds)
        _log("comparing texts")
        texts = compare_texts(started.servers, sizes, seeds)
        about = _describe(arguments, sizes, conditions.attention, started.timeout_sweep, texts)
        text = ""
        for results in _measure(started, arguments, sizes, seeds):
            text = _write(about, results, arguments.out, arguments.plot)
    print(text, end="")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description="Compare the service with FastAPI and LitServe."
    )
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--qformer", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--max-waiting", type=int, default=32, help="BLIP2_MAX_WAITING")
    parser.add_argument("--seconds", type=float, help="of each load in scenario 5")
    parser.add_argument("--only", type=int, nargs="+", choices=SCENARIOS, default=SCENARIOS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    parser.add_argument("--plot", type=Path, help="plot scenario 5 to this file")
    arguments = parser.parse_args()
    arguments.repeats = arguments.repeats or (1 if arguments.quick else 3)
    arguments.seconds = arguments.seconds or (_QUICK_SECONDS if arguments.quick else 30.0)
    if QUESTIONS in arguments.only and arguments.max_waiting < Sizes().num_questions:
        parser.error(f"--max-waiting {arguments.max_waiting} is less than the questions of scenario 3")
    if arguments.plot is not None and LOADS not in arguments.only:
        parser.error("--plot needs scenario 5, which --only excludes")
    return arguments


def _prepare(folder: Path, arguments: argparse.Namespace, sizes: Sizes) -> Conditions:
    """Write the checkpoint in a separate process, and find the attention that is faster in `generate`."""
    _log("writing the checkpoint")
    directory = folder / "checkpoint"
    subprocess.run([sys.executable, "-m", "benchmarks.random_checkpoint", str(directory)], check=True)
    _log("finding the attention that is faster in generate")
    attention = find_attention(directory, arguments.threads, sizes.attention_batch)
    return Conditions(
        directory, folder, arguments.threads, arguments.qformer, arguments.max_waiting, attention
    )


def _start(
    stack: ExitStack, conditions: Conditions, only: Sequence[int], sizes: Sizes, seeds: Iterator[int]
) -> Started:
    _log("starting the servers")
    service = start_service(stack, conditions, cached=False)
    cached = start_service(stack, conditions, cached=True) if CACHE in only else None
    fastapi = start_fastapi(stack, conditions)
    litserve, timeout_sweep = _choose_litserve(stack, conditions, sizes, seeds)
    return Started(PerServer(service, fastapi, litserve), cached, timeout_sweep)


def _choose_litserve(
    stack: ExitStack, conditions: Conditions, sizes: Sizes, seeds: Iterator[int]
) -> tuple[Server, list[tuple[float, float]]]:
    """Measure each batch_timeout, and keep the fastest server."""
    tried: list[tuple[float, Server, ExitStack]] = []
    timeout_sweep: list[tuple[float, float]] = []
    for timeout_s in sizes.batch_timeouts_s:
        _log(f"LitServe with batch_timeout {timeout_s:g} s")
        server_stack = stack.enter_context(ExitStack())
        litserve = start_litserve(server_stack, conditions, timeout_s)
        find_capacity(litserve, replace(sizes, num_sweep=sizes.concurrency), seeds)  # warms up
        per_s = find_capacity(litserve, sizes, seeds)
        tried.append((per_s, litserve, server_stack))
        timeout_sweep.append((timeout_s, per_s))
    tried.sort(key=lambda each: each[0])
    for _, _, server_stack in tried[:-1]:
        server_stack.close()
    return tried[-1][1], timeout_sweep


def _measure(
    started: Started, arguments: argparse.Namespace, sizes: Sizes, seeds: Iterator[int]
) -> Iterator[Results]:
    """Yield the results after the closed loops, and again after each repeat of the open loop."""
    servers, only, repeats = started.servers, arguments.only, range(arguments.repeats)
    _log("scenarios 1 to 4")
    alone = [measure_captions(servers, sizes.num_alone, 1, seeds) for _ in repeats if ALONE in only]
    together = [
        measure_captions(servers, sizes.num_together, sizes.concurrency, seeds)
        for _ in repeats
        if TOGETHER in only
    ]
    questions = [measure_questions(servers, sizes, seeds) for _ in repeats if QUESTIONS in only]
    cache = [
        measure_cache(started.cached, servers.service, sizes, seeds)
        for _ in repeats
        if started.cached is not None
    ]
    results = Results(alone, together, questions, cache, [], None)
    yield results
    if LOADS in only:
        capacity = _capacity(together, servers, sizes, seeds)
        for repeat in repeats:
            _log(f"loads, repeat {repeat + 1}")
            points = measure_loads(servers, capacity, sizes, arguments.seconds, repeat, seeds)
            results = replace(results, loads=[*results.loads, points], capacity=capacity)
            yield results


def _capacity(
    together: Sequence[PerServer[Figures]],
    servers: PerServer[Server],
    sizes: Sizes,
    seeds: Iterator[int],
) -> PerServer[float]:
    """Return the throughput of scenario 2, measured here if it was not selected."""
    if not together:
        return PerServer(
            find_capacity(servers.service, sizes, seeds),
            find_capacity(servers.fastapi, sizes, seeds),
            find_capacity(servers.litserve, sizes, seeds),
        )
    return PerServer(
        median(one.service.per_s for one in together),
        median(one.fastapi.per_s for one in together),
        median(one.litserve.per_s for one in together),
    )


def _describe(
    arguments: argparse.Namespace,
    sizes: Sizes,
    attention: str,
    timeout_sweep: Sequence[tuple[float, float]],
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
        timeout_sweep=timeout_sweep,
        texts=texts,
    )


def _write(about: About, results: Results, out: Path | None, plot: Path | None) -> str:
    """Return the report; write it and the plot if files are given."""
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


def _log(message: str) -> None:
    print(f"· {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
