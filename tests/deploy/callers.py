"""Callers who ask for captions of pictures never seen before, until they are told to stop."""

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx

from tests.deploy.pictures import draw_circle, post, shade
from tests.integration.processes import poll


class Callers:
    """replies: a status, or the name of the error of a request that was lost."""

    def __init__(self, url: str, first_shade: int, num_tokens: int) -> None:
        self.replies: list[int | str] = []
        self._url = url
        self._length = {"min_new_tokens": num_tokens, "max_new_tokens": num_tokens}
        self._shades = itertools.count(first_shade)
        self._stopping = threading.Event()

    def stop(self) -> None:
        """From here on nobody asks again; what was asked is still waited for."""
        self._stopping.set()

    def wait_for_replies(self, count: int) -> None:
        """Waits until so many more have come."""
        wanted = len(self.replies) + count
        poll(lambda: len(self.replies) >= wanted, 120, f"{wanted} replies")

    def call(self) -> None:
        while not self._stopping.is_set():
            image = draw_circle(shade(next(self._shades)))
            body: dict[str, object] = {"image": image, "num_beams": 16, **self._length}
            try:
                self.replies.append(post(self._url, "/caption", body).status_code)
            except httpx.TransportError as exc:
                self.replies.append(repr(exc))


@contextmanager
def callers(url: str, *, count: int = 6, first_shade: int, num_tokens: int = 20) -> Iterator[Callers]:
    """Has so many call at once; all have their last reply when the block is left."""
    crowd = Callers(url, first_shade, num_tokens)
    with ThreadPoolExecutor(count) as pool:
        for _ in range(count):
            pool.submit(crowd.call)
        try:
            yield crowd
        finally:
            crowd.stop()
