"""Measures of an attack: bystanders that must be served meanwhile, and the memory that it takes."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import httpx

from benchmarks.process_memory import resident_bytes
from tests.integration.pictures import in_base64, picture
from tests.integration.processes import ServiceProcess

MAX_PROBE_S = 1.0
MAX_CAPTION_S = 3.0
_INTERVAL_S = 0.05
_ANSWER_TIMEOUT_S = 30.0


class Bystander:
    """Polls /livez, and sends small captions, from two threads with a new connection each time."""

    def __init__(self, url: str) -> None:
        self.probe_seconds: list[float] = []
        self.caption_seconds: list[float] = []
        self.failures: list[str] = []
        self._url = url
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(self._probe, self.probe_seconds)),
            threading.Thread(target=self._repeat, args=(self._caption, self.caption_seconds)),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End both threads, each after one request that began after this call."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def check(self) -> None:
        """Assert that everything was answered in time."""
        assert not self.failures, self.failures[:5]
        assert max(self.probe_seconds) <= MAX_PROBE_S, f"/livez took {max(self.probe_seconds):.2f} s"
        assert max(self.caption_seconds) <= MAX_CAPTION_S, f"/caption took {max(self.caption_seconds):.2f} s"

    def _repeat(self, request: Callable[[int], httpx.Response], seconds: list[float]) -> None:
        is_last = False
        while not is_last:
            is_last = self._ended.wait(_INTERVAL_S)
            started = time.monotonic()
            try:
                answer = request(len(seconds))
                if answer.status_code != 200:
                    self.failures.append(f"{answer.url}: {answer.status_code} {answer.text[:200]}")
            except httpx.HTTPError as exc:
                self.failures.append(f"{request!r}: {exc!r}")
            seconds.append(time.monotonic() - started)

    def _probe(self, _: int) -> httpx.Response:
        return httpx.get(f"{self._url}/livez", timeout=_ANSWER_TIMEOUT_S)

    def _caption(self, index: int) -> httpx.Response:
        body = {"image": in_base64(picture(index)), "num_beams": 1, "max_new_tokens": 5}
        return httpx.post(f"{self._url}/caption", json=body, timeout=_ANSWER_TIMEOUT_S)


@contextmanager
def bystander(service: ServiceProcess) -> Iterator[Bystander]:
    """Serve a bystander meanwhile; assert on exit that it was answered within the limits above."""
    watched = Bystander(service.url)
    watched.start()
    try:
        yield watched
    finally:
        watched.stop()
    watched.check()


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
