"""Measures of an attack: bystanders that must be served meanwhile, and the memory that it takes."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from benchmarks.process_memory import resident_bytes
from tests.integration.processes import ServiceProcess, poll

MAX_PROBE_S = 1.0
MAX_CAPTION_S = 3.0


class BystanderProcess:
    """A `tests.attacks.bystander` in a process of its own, so that the attacker does not slow it down."""

    def __init__(self, url: str) -> None:
        self.probe_seconds: list[float] = []
        self.caption_seconds: list[float] = []
        self.failures: list[str] = []
        command = [sys.executable, "-m", "tests.attacks.bystander", url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._thread = threading.Thread(target=self._read)

    def start(self) -> None:
        """Wait until it has been answered twice."""
        self._thread.start()
        poll(lambda: self.probe_seconds and self.caption_seconds, 60, "the bystander's first answers")

    def stop(self) -> None:
        """End it, after one more request of each kind."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._thread.join()
        self._process.wait()

    def check(self) -> None:
        """Assert that everything was answered in time."""
        assert not self.failures, self.failures[:5]
        assert max(self.probe_seconds) <= MAX_PROBE_S, f"/livez took {max(self.probe_seconds):.2f} s"
        assert max(self.caption_seconds) <= MAX_CAPTION_S, f"/caption took {max(self.caption_seconds):.2f} s"

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in map(json.loads, lines):
                by_kind = {"probe": self.probe_seconds, "caption": self.caption_seconds}
                by_kind[line["kind"]].append(line["seconds"])
                if line["failure"]:
                    self.failures.append(line["failure"])


@contextmanager
def bystander(service: ServiceProcess) -> Iterator[BystanderProcess]:
    """Serve a bystander meanwhile; assert on exit that it was answered within the limits above."""
    client = BystanderProcess(service.url)
    try:
        client.start()
        yield client
    finally:
        client.stop()
    client.check()


class MemoryWatch:
    """Measures the memory of a service and its child processes within a `with` block, in bytes.

    peak_bytes: the most of all resident memory together, sampled; before_bytes, after_bytes: at the ends.
    """

    def __init__(self, service: ServiceProcess) -> None:
        self._pid = service.process.pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self.before_bytes = self.peak_bytes = self.after_bytes = 0

    def __enter__(self) -> Self:
        self.before_bytes = self.peak_bytes = resident_bytes(self._pid)
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self.after_bytes = resident_bytes(self._pid)

    @property
    def growth_bytes(self) -> int:
        return self.peak_bytes - self.before_bytes

    def _sample(self) -> None:
        while not self._ended.wait(0.02):
            self.peak_bytes = max(self.peak_bytes, resident_bytes(self._pid))
