"""Processes on free ports: `python -m service`, and redis-server."""

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

START_TIMEOUT_S = 120.0  # importing torch on a busy machine takes its time
STOP_TIMEOUT_S = 60.0


def poll(condition: Callable[[], object], timeout_s: float, awaited: str) -> None:
    """Wait until the condition holds; fail after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out after {timeout_s} s, waiting for {awaited}"
        time.sleep(0.05)


async def poll_async(condition: Callable[[], Awaitable[object]], timeout_s: float) -> None:
    """Wait as `poll`, without blocking the event loop."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 - another process has no event
            await asyncio.sleep(0.01)


class ServiceProcess:
    """A process `python -m service` with these settings; its output is written to files in `directory`.

    module: module to run instead of `service`. variables: further environment variables.
    """

    def __init__(
        self,
        directory: Path,
        *,
        module: str = "service",
        variables: Mapping[str, str] | None = None,
        **settings: object,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._output, self._errors = directory / "stdout", directory / "stderr"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("BLIP2_")}
        environment |= {"OMP_NUM_THREADS": "1", "BLIP2_PORT": "0"}
        environment |= variables or {}
        environment |= {f"BLIP2_{name.upper()}": str(value) for name, value in settings.items()}
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module], env=environment, stdout=output, stderr=errors
            )
        self.url = ""

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def wait_ready(self) -> None:
        """Wait for the address in the output, and for /readyz."""

        def announced() -> re.Match[str] | None:
            assert self.process.poll() is None, f"the service ended: {self.errors}"
            return re.search(r"on (http://\S+) ", self.output)

        poll(announced, START_TIMEOUT_S, "the address")
        match = announced()
        assert match is not None
        self.url = match[1]
        poll(lambda: httpx.get(f"{self.url}/readyz").status_code == 200, START_TIMEOUT_S, "readiness")

    def total(self, name: str) -> float:
        """Return the sum of all series of this metric."""
        text = httpx.get(f"{self.url}/metrics").text
        return sum(float(value) for value in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE))

    def metric(self, series: str) -> float:
        """Return the value of one series."""
        text = httpx.get(f"{self.url}/metrics").text
        found = re.search(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
        assert found, f"{series} is not among the metrics"
        return float(found[1])

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Wait for the end of the process, and return the exit code."""
        return self.process.wait(STOP_TIMEOUT_S)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(STOP_TIMEOUT_S)


@contextmanager
def service(directory: Path, **settings: Any) -> Iterator[ServiceProcess]:
    """Start a `ServiceProcess`, wait until it is ready, and kill it on exit."""
    started = ServiceProcess(directory, **settings)
    try:
        started.wait_ready()
        yield started
    finally:
        started.kill()


class RedisProcess:
    """A redis-server on a free port, without persistence."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                "redis-server",
                "--port",
                str(self.port),
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--appendonly",
                "no",
            ],
            stdout=subprocess.DEVNULL,
        )
        poll(self._responds, START_TIMEOUT_S, "redis-server")

    def _responds(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(5) == b"+PONG"
        except OSError:
            return False

    def freeze(self) -> None:
        """Stop the process with SIGSTOP: connections stay open, and no command is answered."""
        self.process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(STOP_TIMEOUT_S)


@contextmanager
def redis_server() -> Iterator[RedisProcess]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed; apt-get install redis-server")
    started = RedisProcess()
    try:
        yield started
    finally:
        started.kill()
