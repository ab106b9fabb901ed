"""Attack test: ordinary load with attacks mixed into it, in turns with the same load alone.

    python -m benchmarks.attacks [--minutes 10] [--workers 4] [--attackers 2] [--out FILE.md]
        [--attacker-address 127.0.0.2]

The service is `python -m service` with the embedded model and its default settings. Prints a table, and exits
with 1 unless all conditions are met. Linux only: memory is read from /proc.
"""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np

from benchmarks.attacks.hostile_requests import attacks, retrieval
from benchmarks.attacks.report import AttackResult, Window, attack_report, checks_of
from benchmarks.process_memory import resident_bytes
from benchmarks.reporting import describe_machine, describe_versions
from benchmarks.server_process import ServerProcess, free_port, stopped_on_exit
from benchmarks.soak.traffic import Traffic

_WINDOW_S = 30.0
_WARM_UP_S = 30.0
_FILL_REQUESTS = 128  # of as many images each as do not make a request a bulk request: they fill the cache
_FILL_IMAGES = 32
_SAMPLE_S = 0.1
_SETTLE_S = 5.0
_TIMEOUT_S = 120.0


class AttackRun:
    """Ordinary clients, attackers, and what both are answered."""

    def __init__(
        self, server: ServerProcess, *, num_workers: int, num_attackers: int, attacker_address: str
    ) -> None:
        self._server = server
        self._num_workers = num_workers
        self._num_attackers = num_attackers
        self._attacker_address = attacker_address
        self._traffic = Traffic(seed=0)
        self._rng = np.random.default_rng(0)
        self._attacks = attacks(attacker_address)
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)

    async def run(self, seconds: float, *, attacked: bool) -> Window:
        """Send ordinary load for some time, and attacks too if `attacked`."""
        window, until = Window(attacked), time.monotonic() + seconds
        sampling = asyncio.create_task(self._sample(window))
        async with asyncio.TaskGroup() as group:
            for _ in range(self._num_workers):
                group.create_task(self._work(window, until))
            for _ in range(self._num_attackers if attacked else 0):
                group.create_task(self._attack(until))
        sampling.cancel()
        with suppress(asyncio.CancelledError):
            await sampling
        return window

    async def fill_cache(self) -> None:
        """Send new images until the cache of the process is full, which is not to be taken for a leak."""
        async with httpx.AsyncClient(
            base_url=self._server.url, timeout=_TIMEOUT_S, trust_env=False
        ) as client:
            for _ in range(_FILL_REQUESTS):
                response = await client.post("/retrieve", json=retrieval(_FILL_IMAGES))
                response.raise_for_status()

    async def _work(self, window: Window, until: float) -> None:
        async with httpx.AsyncClient(
            base_url=self._server.url, timeout=_TIMEOUT_S, trust_env=False
        ) as client:
            while time.monotonic() < until:
                request = self._traffic.draw_valid()
                headers = {"Content-Type": request.content_type}
                started = time.monotonic()
                response = await client.post(request.path, content=request.body, headers=headers)
                window.seconds[request.path].append(time.monotonic() - started)
                window.statuses[response.status_code] += 1

    async def _attack(self, until: float) -> None:
        names = list(self._attacks)
        transport = httpx.AsyncHTTPTransport(local_address=self._attacker_address)
        async with httpx.AsyncClient(
            base_url=self._server.url, timeout=_TIMEOUT_S, transport=transport
        ) as client:
            while time.monotonic() < until:
                name = names[self._rng.integers(len(names))]
                try:
                    self.outcomes[name][await self._attacks[name](client)] += 1
                except httpx.HTTPError as exc:
                    self.outcomes[name][type(exc).__name__] += 1

    async def _sample(self, window: Window) -> None:
        while True:
            window.peak_bytes = max(
                window.peak_bytes, await asyncio.to_thread(resident_bytes, self._server.process.pid)
            )
            await asyncio.sleep(_SAMPLE_S)


def main() -> None:
    arguments = _parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM stops the service too
    with tempfile.TemporaryDirectory() as folder:
        server = _start(Path(folder))
        with stopped_on_exit(server):
            server.wait_ready()
            result = asyncio.run(_run(server, arguments))
            if not all(check.passed for check in checks_of(result)):
                print(server.log_end(), file=sys.stderr)
    text = attack_report(_command(arguments), _about(arguments), result)
    print(text, end="")
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")
    sys.exit(not all(check.passed for check in checks_of(result)))


async def _run(server: ServerProcess, arguments: argparse.Namespace) -> AttackResult:
    run = AttackRun(
        server,
        num_workers=arguments.workers,
        num_attackers=arguments.attackers,
        attacker_address=arguments.attacker_address,
    )
    await run.fill_cache()
    await run.run(_WARM_UP_S, attacked=False)
    await asyncio.sleep(_SETTLE_S)
    before_bytes = resident_bytes(server.process.pid)
    windows = []
    for index in range(round(60 * arguments.minutes / _WINDOW_S)):
        windows.append(await run.run(_WINDOW_S, attacked=index % 2 == 1))
        print(f"window {index}: p99 {windows[-1].percentile(0.99):.3f} s", file=sys.stderr, flush=True)
    await asyncio.sleep(_SETTLE_S)
    after_bytes, has_ended = resident_bytes(server.process.pid), server.process.poll() is not None
    return AttackResult(windows, run.outcomes, before_bytes, after_bytes, int(has_ended), server.stop())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attacks", description="Mix attacks into ordinary load."
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--workers", type=int, default=4, help="ordinary clients")
    parser.add_argument("--attackers", type=int, default=2)
    parser.add_argument(
        "--attacker-address",
        default="127.0.0.2",
        metavar="IP",
        help="of this machine; with 127.0.0.1 the service cannot tell attackers from the ordinary clients",
    )
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    return parser.parse_args()


def _start(folder: Path) -> ServerProcess:
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BLIP2_")}
    environment |= {"BLIP2_PORT": str(port), "BLIP2_LOG_LEVEL": "WARNING"}
    command = [sys.executable, "-m", "service"]
    return ServerProcess(
        "the service", command, environment=environment, folder=folder, port=port, ready_path="/readyz"
    )


def _command(arguments: argparse.Namespace) -> str:
    return (
        f"python -m benchmarks.attacks --minutes {arguments.minutes:g} --workers {arguments.workers} "
        f"--attackers {arguments.attackers} --attacker-address {arguments.attacker_address}"
    )


def _about(arguments: argparse.Namespace) -> str:
    return (
        f"{describe_machine()}; {describe_versions()}. `python -m service` with the embedded model and its "
        f"default settings. {arguments.workers} ordinary clients send the next request once the last is "
        f"answered; {arguments.attackers} attackers do the same with attacks, drawn at random, from "
        f"{arguments.attacker_address}. Windows of {_WINDOW_S:g} s without and with attacks alternate; a p99 "
        "is the median over its windows."
    )


if __name__ == "__main__":
    main()
