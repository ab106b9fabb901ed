"""Images that the default model was trained for, and requests over HTTP."""

import io
from typing import Any

import httpx
from PIL import Image, ImageDraw

from tests.integration.pictures import in_base64


def draw_circle(color: str, radius: int = 24) -> str:
    """Return a PNG of a circle, in base64."""
    image = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(image).ellipse((48 - radius, 48 - radius, 48 + radius, 48 + radius), fill=color)
    file = io.BytesIO()
    image.save(file, "PNG")
    return in_base64(file.getvalue())


def shade(number: int) -> str:
    """Return a different colour for each number below 2**16."""
    return f"#{number:04x}80"


def post(url: str, path: str, body: dict[str, object]) -> httpx.Response:
    return httpx.post(f"{url}{path}", json=body, timeout=60, trust_env=False)


def ask(url: str, path: str, body: dict[str, object]) -> dict[str, Any]:
    """Send a request and return the response body; raise AssertionError unless the status is 200."""
    response = post(url, path, body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer
