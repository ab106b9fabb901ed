"""The three servers that are compared, all on one checkpoint and with the same number of threads."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from benchmarks.server_process import ServerProcess, free_port, stopped_afterwards, turn_of
from benchmarks.service_metrics import check_run, scrape
from benchmarks.serving.load import Run, closed_loop, open_loop
from benchmarks.serving.requests import Request

OURS, NAIVE, LITSERVE = "this project", "FastAPI", "LitServe"
LITSERVE_BATCH = 16
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sides(Generic[T]):
    """One thing for each server."""

    ours: T
    naive: T
    litserve: T


@dataclass(frozen=True, slots=True)
class Conditions:
    """What all servers have in common, and what is told to ours; folder: of the logs."""

    directory: Path
    folder: Path
    num_threads: int
    qformer: str
    max_waiting: int
    attention: str


class Contender:
    """A server that is paused but while it is measured; ours is asked what it counted, too."""

    def __init__(self, server: ServerProcess, *, has_metrics: bool) -> None:
        self._server = server
        self._has_metrics = has_metrics

    def run_closed(self, requests: Sequence[Request], concurrency: int) -> Run:
        """Raises LoadError, and ServerError where it ended."""
        return self._run(closed_loop(self._server.url, requests, concurrency))

    def run_open(self, requests: Sequence[Request], arrivals_s: Sequence[float], end_s: float) -> Run:
        """Raises LoadError, and ServerError where it ended."""
        return self._run(open_loop(self._server.url, requests, arrivals_s, end_s))

    def _run(self, load: Coroutine[Any, Any, Run]) -> Run:
        with turn_of(self._server):
            before = scrape(self._server.url) if self._has_metrics else None
            run = asyncio.run(load)
            self._server.wait_idle()
            if before is not None:
                check_run(before, scrape(self._server.url), run)
        return run


def start_ours(stack: ExitStack, conditions: Conditions, *, cached: bool) -> Contender:
    """Gives the service, with its cache as it is by default or without one."""
    port, most = free_port(), conditions.max_waiting
    settings = {
        "MODEL": conditions.directory,
        "DTYPE": "bfloat16",
        "QFORMER_DTYPE": conditions.qformer,
        "NUM_THREADS": conditions.num_threads,
        "PORT": port,
        "MAX_WAITING": most,
        "MAX_IMAGES": min(32, most),
        "MAX_QUESTIONS": min(32, most),
        "MAX_CANDIDATES": min(1000, most),
        "LOG_LEVEL": "WARNING",
    } | ({} if cached else {"CACHE_BYTES": 0})
    environment = _environment(conditions) | {f"BLIP2_{name}": str(value) for name, value in settings.items()}
    server = ServerProcess(
        f"{OURS}, {'cached' if cached else 'no cache'}",
        [sys.executable, "-m", "service"],
        environment=environment,
        folder=conditions.folder,
        port=port,
        ready_path="/readyz",
    )
    return _ready(stack, server, has_metrics=True)


def start_naive(stack: ExitStack, conditions: Conditions) -> Contender:
    return _start_script(stack, conditions, NAIVE, "fastapi_server")


def start_litserve(stack: ExitStack, conditions: Conditions, batch_timeout_s: float) -> Contender:
    options = ("--max-batch-size", str(LITSERVE_BATCH), "--batch-timeout", str(batch_timeout_s))
    return _start_script(stack, conditions, LITSERVE, "litserve_server", *options)


def find_attention(directory: Path, num_threads: int, batch: int) -> str:
    """Measures which attention makes `generate` of transformers faster, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.serving.transformers_model", str(directory)]
    command += ["--threads", str(num_threads), "--batch", str(batch)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.split()[-1]


def _start_script(
    stack: ExitStack, conditions: Conditions, name: str, module: str, *options: str
) -> Contender:
    port = free_port()
    command = [
        sys.executable,
        "-m",
        f"benchmarks.serving.{module}",
        str(conditions.directory),
        "--port",
        str(port),
    ]
    command += ["--threads", str(conditions.num_threads), "--attention", conditions.attention, *options]
    server = ServerProcess(
        name,
        command,
        environment=_environment(conditions),
        folder=conditions.folder,
        port=port,
        ready_path="/health",
    )
    return _ready(stack, server, has_metrics=False)


def _ready(stack: ExitStack, server: ServerProcess, *, has_metrics: bool) -> Contender:
    stack.enter_context(stopped_afterwards(server))
    server.wait_ready()
    server.pause()
    return Contender(server, has_metrics=has_metrics)


def _environment(conditions: Conditions) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BLIP2_")}
    return inherited | {"OMP_NUM_THREADS": str(conditions.num_threads), "HF_HUB_OFFLINE": "1"}
