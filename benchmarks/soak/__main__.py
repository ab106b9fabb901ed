"""Soak test: run one service under mixed traffic, and check for leaks, hangs and lost requests.

    python -m benchmarks.soak [--minutes 10] [--workers 8] [--redis] [--threads 1] [--seed 0] [--out FILE.md]

The traffic contains captions, questions and retrieval, repeated and new images, invalid input, disconnects,
short deadlines, and bursts above the limits. The service is `python -m service` with the embedded model.
Prints a table, and exits with 1 unless all conditions are met. Linux only: the process is read from /proc.
"""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from benchmarks.reporting import describe_machine, describe_versions
from benchmarks.server_process import ServerProcess, free_port, stopped_on_exit
from benchmarks.service_metrics import scrape
from benchmarks.soak.client import Tally, send_for
from benchmarks.soak.redis_process import redis_server
from benchmarks.soak.report import Sample, SoakResult, checks_of, soak_report
from benchmarks.soak.traffic import BURST, LIMITS, Traffic

_SAMPLE_S = 10.0
_WARM_UP = (60.0, 0.2)  # seconds, but at most this share of the whole
_STEADY = (120.0, 0.4)
_IDLE_TIMEOUT_S = 60.0
_LAST_CONNECTIONS_S = 2.0


class Soak:
    """The service and its traffic; `elapsed` counts the time under load only."""

    def __init__(self, server: ServerProcess, *, seed: int, num_workers: int) -> None:
        self._server = server
        self._traffic = Traffic(seed)
        self._num_workers = num_workers
        self._elapsed_s = 0.0
        self.tally = Tally()
        self.samples: list[Sample] = []

    def load(self, seconds: float) -> None:
        """Send traffic for `seconds`, and sample the process regularly."""
        asyncio.run(self._load(seconds))
        self._elapsed_s += seconds

    def sample_idle(self) -> Sample:
        """Wait until no request is waiting or running, for a limited time, and sample the process."""
        deadline = time.monotonic() + _IDLE_TIMEOUT_S
        while time.monotonic() < deadline:
            metrics = scrape(self._server.url)
            if metrics.waiting == metrics.running == 0:
                break
            time.sleep(0.2)
        time.sleep(_LAST_CONNECTIONS_S)
        return self._sample(self._elapsed_s)

    async def _load(self, seconds: float) -> None:
        sampling = asyncio.create_task(self._sample_regularly())
        try:
            await send_for(
                self._server.url, self._traffic, self.tally, num_workers=self._num_workers, seconds=seconds
            )
        finally:
            sampling.cancel()
            with suppress(asyncio.CancelledError):
                await sampling

    async def _sample_regularly(self) -> None:
        began = time.monotonic()
        while True:
            await asyncio.sleep(_SAMPLE_S - (time.monotonic() - began) % _SAMPLE_S)
            time_s = self._elapsed_s + time.monotonic() - began
            self.samples.append(await asyncio.to_thread(self._sample, time_s))
            print(self.samples[-1].row(), file=sys.stderr, flush=True)

    def _sample(self, time_s: float) -> Sample:
        proc = Path("/proc") / str(self._server.process.pid)
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        descriptors = len(list((proc / "fd").iterdir()))
        metrics, tally = scrape(self._server.url), self.tally
        return Sample(
            time_s=time_s,
            sent=tally.sent,
            answered=tally.answered,
            refused=tally.refused,
            shed=tally.shed,
            expired=tally.expired,
            abandoned=tally.abandoned,
            rss_bytes=int(status["VmRSS"].split()[0]) * 1024,
            threads=int(status["Threads"]),
            descriptors=descriptors,
            waiting=metrics.waiting,
            running=metrics.running,
        )


def main() -> None:
    arguments = _parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM stops the service too
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        redis_url = stack.enter_context(redis_server()) if arguments.redis else None
        server = _start(Path(folder), arguments.threads, redis_url)
        stack.enter_context(stopped_on_exit(server))
        server.wait_ready()
        result = _run(server, arguments)
        if not all(check.passed for check in checks_of(result)):
            print(server.log_end(), file=sys.stderr)
    text = soak_report(_command(arguments), _about(arguments), result)
    print(text, end="")
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")
    sys.exit(not all(check.passed for check in checks_of(result)))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description="Run one service under mixed traffic."
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--redis", action="store_true", help="with a redis-server, which must be installed")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    return parser.parse_args()


def _start(folder: Path, num_threads: int, redis_url: str | None) -> ServerProcess:
    port = free_port()
    settings: dict[str, object] = {"port": port, "num_threads": num_threads, "log_level": "WARNING", **LIMITS}
    if redis_url is not None:
        settings["redis_url"] = redis_url
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BLIP2_")}
    environment |= {f"BLIP2_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "service"]
    return ServerProcess(
        "the service", command, environment=environment, folder=folder, port=port, ready_path="/readyz"
    )


def _run(server: ServerProcess, arguments: argparse.Namespace) -> SoakResult:
    seconds = 60 * arguments.minutes
    warm_up_s, steady_s = (min(most, share * seconds) for most, share in (_WARM_UP, _STEADY))
    soak = Soak(server, seed=arguments.seed, num_workers=arguments.workers)
    before = scrape(server.url)
    soak.load(warm_up_s)
    warm = soak.sample_idle()
    soak.load(seconds - warm_up_s)
    final = soak.sample_idle()
    counted = scrape(server.url).statuses - before.statuses
    return SoakResult(soak.tally, counted, soak.samples, warm, final, steady_s, server.stop())


def _command(arguments: argparse.Namespace) -> str:
    command = (
        f"python -m benchmarks.soak --minutes {arguments.minutes:g} --workers {arguments.workers} "
        f"--threads {arguments.threads} --seed {arguments.seed}"
    )
    return f"{command} --redis" if arguments.redis else command


def _about(arguments: argparse.Namespace) -> str:
    limits = ", ".join(f"BLIP2_{name.upper()}={value}" for name, value in LIMITS.items())
    return (
        f"{describe_machine()}; {describe_versions()}. `python -m service` with the embedded model, {limits}"
        f"{', with a redis-server' if arguments.redis else ''}; {arguments.workers} workers, bursts of "
        f"{BURST}. The warm-up is the first minute, or a fifth of a shorter run."
    )


if __name__ == "__main__":
    main()
