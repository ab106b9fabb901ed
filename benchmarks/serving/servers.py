"""The three compared servers: one checkpoint and the same number of torch threads for each."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from benchmarks.server_process import ServerProcess, free_port, resumed, stopped_on_exit
from benchmarks.service_metrics import Scrape, scrape
from benchmarks.serving.load import LoadError, Outcome, Run, closed_loop, open_loop
from benchmarks.serving.requests import Request

SERVICE, FASTAPI, LITSERVE = "this project", "FastAPI", "LitServe"
LITSERVE_BATCH = 16
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PerServer(Generic[T]):
    """One value for each server."""

    service: T
    fastapi: T
    litserve: T


@dataclass(frozen=True, slots=True)
class Conditions:
    """Conditions of a comparison.

    directory: the checkpoint. folder: for the logs. qformer, max_waiting: settings of the service.
    attention: implementation that transformers uses in the other two servers.
    """

    directory: Path
    folder: Path
    num_threads: int
    qformer: str
    max_waiting: int
    attention: str


class Server:
    """A server that is paused except during its measurement.

    has_metrics: the server counts its requests, and the counts are compared with the client's.
    """

    def __init__(self, server: ServerProcess, *, has_metrics: bool) -> None:
        self._server = server
        self._has_metrics = has_metrics

    def run_closed(self, requests: Sequence[Request], concurrency: int) -> Run:
        """Run a closed loop. Raise LoadError, or ServerError if the server ended."""
        return self._run(closed_loop(self._server.url, requests, concurrency))

    def run_open(self, requests: Sequence[Request], arrivals_s: Sequence[float], end_s: float) -> Run:
        """Run an open loop. Raise LoadError, or ServerError if the server ended."""
        return self._run(open_loop(self._server.url, requests, arrivals_s, end_s))

    def _run(self, load: Coroutine[Any, Any, Run]) -> Run:
        with resumed(self._server):
            before = scrape(self._server.url) if self._has_metrics else None
            run = asyncio.run(load)
            self._server.wait_idle()
            if before is not None:
                check_counts(before, scrape(self._server.url), run)
        return run


def check_counts(before: Scrape, after: Scrape, run: Run) -> None:
    """Raise LoadError unless the service counted the same responses as its client between two scrapes."""
    statuses = after.statuses - before.statuses
    by_client = {outcome: run.count(outcome) for outcome in Outcome}
    by_service = {
        Outcome.ANSWERED: statuses[200],
        Outcome.REJECTED: statuses[429] + statuses[503],
        Outcome.EXPIRED: statuses[504],
        Outcome.ABANDONED: statuses[499],
    }
    # The service may have answered a request at the moment in which the client abandoned it.
    late = by_service[Outcome.ANSWERED] - by_client[Outcome.ANSWERED]
    matches = (
        0 <= late <= by_client[Outcome.ABANDONED]
        and by_service[Outcome.ABANDONED] + late == by_client[Outcome.ABANDONED]
        and by_service[Outcome.REJECTED] == by_client[Outcome.REJECTED] == after.shed - before.shed
        and by_service[Outcome.EXPIRED] == by_client[Outcome.EXPIRED]
    )
    if not matches:
        raise LoadError(
            f"the service counted {by_service}, {after.shed - before.shed} shed; its client {by_client}"
        )


def start_service(stack: ExitStack, conditions: Conditions, *, cached: bool) -> Server:
    """Start the service, with its default cache or without a cache."""
    port, max_waiting = free_port(), conditions.max_waiting
    settings = {
        "MODEL": conditions.directory,
        "DTYPE": "bfloat16",
        "QFORMER_DTYPE": conditions.qformer,
        "NUM_THREADS": conditions.num_threads,
        "PORT": port,
        "MAX_WAITING": max_waiting,
        "MAX_IMAGES": min(32, max_waiting),
        "MAX_QUESTIONS": min(32, max_waiting),
        "MAX_CANDIDATES": min(1000, max_waiting),
        "LOG_LEVEL": "WARNING",
    } | ({} if cached else {"CACHE_BYTES": 0})
    environment = _environment(conditions) | {f"BLIP2_{name}": str(value) for name, value in settings.items()}
    server = ServerProcess(
        f"{SERVICE}, {'cached' if cached else 'no cache'}",
        [sys.executable, "-m", "service"],
        environment=environment,
        folder=conditions.folder,
        port=port,
        ready_path="/readyz",
    )
    return _pause_when_ready(stack, server, has_metrics=True)


def start_fastapi(stack: ExitStack, conditions: Conditions) -> Server:
    """Start the FastAPI server, which runs one request at a time."""
    return _start_module(stack, conditions, FASTAPI, "fastapi_server")


def start_litserve(stack: ExitStack, conditions: Conditions, batch_timeout_s: float) -> Server:
    """Start the LitServe server, which waits `batch_timeout_s` for a batch to fill."""
    options = ("--max-batch-size", str(LITSERVE_BATCH), "--batch-timeout", str(batch_timeout_s))
    return _start_module(stack, conditions, LITSERVE, "litserve_server", *options)


def find_attention(directory: Path, num_threads: int, batch: int) -> str:
    """Return the attention implementation with the faster `generate`, measured in a separate process."""
    command = [sys.executable, "-m", "benchmarks.serving.transformers_model", str(directory)]
    command += ["--threads", str(num_threads), "--batch", str(batch)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.split()[-1]


def _start_module(stack: ExitStack, conditions: Conditions, name: str, module: str, *options: str) -> Server:
    port = free_port()
    command = [sys.executable, "-m", f"benchmarks.serving.{module}", str(conditions.directory)]
    command += ["--port", str(port), "--threads", str(conditions.num_threads)]
    command += ["--attention", conditions.attention, *options]
    server = ServerProcess(
        name,
        command,
        environment=_environment(conditions),
        folder=conditions.folder,
        port=port,
        ready_path="/health",
    )
    return _pause_when_ready(stack, server, has_metrics=False)


def _pause_when_ready(stack: ExitStack, server: ServerProcess, *, has_metrics: bool) -> Server:
    stack.enter_context(stopped_on_exit(server))
    server.wait_ready()
    server.pause()
    return Server(server, has_metrics=has_metrics)


def _environment(conditions: Conditions) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BLIP2_")}
    return inherited | {"OMP_NUM_THREADS": str(conditions.num_threads), "HF_HUB_OFFLINE": "1"}
