"""An HTTP client of a running server, as a user would call it."""

import base64
import io
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

import httpx
from tqdm import tqdm

from training.world.rendering import render_scene
from training.world.scenes import Scene

_MAX_ATTEMPTS = 100
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class EvaluationError(Exception):
    """The server cannot be reached or rejects a request; the message holds its response."""


class ServerClient:
    """A client of the routes `/vqa`, `/caption` and `/retrieve` with `concurrency` connections."""

    def __init__(self, url: str, concurrency: int) -> None:
        self._http = httpx.Client(base_url=url, timeout=120.0)
        self._concurrency = concurrency

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send one request, and again after `Retry-After` while the server responds with 429.

        Raises EvaluationError with the response unless its status is 200.
        """
        for _ in range(_MAX_ATTEMPTS):
            try:
                response = self._http.post(path, json=body)
            except httpx.HTTPError as exc:
                url = f"{self._http.base_url}{path}"
                raise EvaluationError(f"{url}: {exc!r}; is the server running?") from exc
            if response.status_code != httpx.codes.TOO_MANY_REQUESTS:
                break
            time.sleep(float(response.headers["Retry-After"]))
        if response.status_code != httpx.codes.OK:
            raise EvaluationError(f"{path} answered {response.status_code}: {response.text[:500]}")
        content: dict[str, Any] = response.json()
        return content

    def map(self, request: Callable[[_Item], _Result], items: Iterable[_Item], label: str) -> list[_Result]:
        """Call `request` for every item, several at a time, and return the results in order."""
        pending = list(items)
        with ThreadPoolExecutor(self._concurrency) as pool:
            return list(tqdm(pool.map(request, pending), desc=label, total=len(pending), mininterval=5))


def encode_image(scene: Scene, image_size: int) -> str:
    """Render a scene and encode it as a base64 PNG."""
    buffer = io.BytesIO()
    render_scene(scene, image_size).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
