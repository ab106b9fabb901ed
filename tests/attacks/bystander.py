"""`python -m tests.attacks.bystander URL`: a client beside an attack, in a process of its own.

It polls /livez, and sends small captions, from two threads with a new connection each time. It prints one
line of JSON for each answer, and ends when its standard input does: each thread after one more request.
"""

import json
import sys
import threading
import time
from collections.abc import Callable

import httpx

from tests.integration.pictures import in_base64, picture

_INTERVAL_S = 0.05
_ANSWER_TIMEOUT_S = 30.0


class Bystander:
    """Sends requests to the service at a URL until it is stopped."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._ended = threading.Event()
        self._printing = threading.Lock()
        self._threads = [
            threading.Thread(target=self._repeat, args=("probe", self._probe)),
            threading.Thread(target=self._repeat, args=("caption", self._caption)),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End both threads, each after one request that began after this call."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, kind: str, request: Callable[[int], httpx.Response]) -> None:
        is_last, index = False, 0
        while not is_last:
            is_last = self._ended.wait(_INTERVAL_S)
            failure, started = "", time.monotonic()
            try:
                answer = request(index)
                if answer.status_code != 200:
                    failure = f"{answer.url}: {answer.status_code} {answer.text[:200]}"
            except httpx.HTTPError as exc:
                failure = f"{kind}: {exc!r}"
            line = {"kind": kind, "seconds": time.monotonic() - started, "failure": failure}
            with self._printing:
                print(json.dumps(line), flush=True)
            index += 1

    def _probe(self, _: int) -> httpx.Response:
        return httpx.get(f"{self._url}/livez", timeout=_ANSWER_TIMEOUT_S)

    def _caption(self, index: int) -> httpx.Response:
        body = {"image": in_base64(picture(index)), "num_beams": 1, "max_new_tokens": 5}
        return httpx.post(f"{self._url}/caption", json=body, timeout=_ANSWER_TIMEOUT_S)


def main() -> None:
    client = Bystander(sys.argv[1])
    client.start()
    sys.stdin.read()
    client.stop()


if __name__ == "__main__":
    main()
