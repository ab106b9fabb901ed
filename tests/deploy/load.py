"""A closed-loop load of caption requests, each with a new image, until it is stopped."""

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx

from tests.deploy.pictures import draw_circle, post, shade
from tests.integration.processes import poll


class Load:
    """Clients that send one request after another; outcomes: HTTP statuses, and errors of lost requests."""

    def __init__(self, url: str, first_shade: int, num_tokens: int) -> None:
        self.outcomes: list[int | str] = []
        self._url = url
        self._length = {"min_new_tokens": num_tokens, "max_new_tokens": num_tokens}
        self._shades = itertools.count(first_shade)
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Send no further request; the responses of those under way are still awaited."""
        self._stopping.set()

    def wait_for_outcomes(self, count: int) -> None:
        """Wait for `count` further outcomes."""
        target = len(self.outcomes) + count
        poll(lambda: len(self.outcomes) >= target, 120, f"{target} outcomes")

    def send_until_stopped(self) -> None:
        while not self._stopping.is_set():
            image = draw_circle(shade(next(self._shades)))
            body: dict[str, object] = {"image": image, "num_beams": 16, **self._length}
            try:
                self.outcomes.append(post(self._url, "/caption", body).status_code)
            except httpx.TransportError as exc:
                self.outcomes.append(repr(exc))


@contextmanager
def run_load(url: str, *, count: int = 6, first_shade: int, num_tokens: int = 20) -> Iterator[Load]:
    """Run a load of `count` clients in the block; on exit, stop it and await the last responses."""
    load = Load(url, first_shade, num_tokens)
    with ThreadPoolExecutor(count) as pool:
        for _ in range(count):
            pool.submit(load.send_until_stopped)
        try:
            yield load
        finally:
            load.stop()
