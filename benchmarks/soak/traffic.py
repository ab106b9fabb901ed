"""Random traffic of the soak test: valid and invalid requests, disconnects and short deadlines."""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import httpx
import numpy as np
from PIL import Image

LIMITS = {
    "max_waiting": 32,
    "max_images": 8,
    "max_questions": 8,
    "max_candidates": 32,
    "cache_bytes": 8 * 2**20,
}
BURST = 100
_SIZES = ((48, 36), (160, 120), (320, 240), (640, 480), (1600, 1200))
_SIZE_WEIGHTS = (0.3, 0.3, 0.25, 0.1, 0.05)
_NUM_FILES = 40
_SHARE_REPEATED = 0.5
_SHARE_BURSTS = 0.01
_SHARE_HALF = 0.3
_MAX_DISCONNECT_S = 0.2
_MAX_DEADLINE_MS = 100
_JPEG_START = 2  # bytes; a comment may follow
_WORDS = ("what", "color", "is", "the", "large", "striped", "red", "star", "circle", "left", "of", "above")


@dataclass(frozen=True, slots=True)
class TrafficRequest:
    """One request.

    expected: its status unless it is rejected for overload, or expires after timeout_ms. disconnect_s: the
    client closes the connection after this time; None: it waits. sends_half: it sends half of the body first.
    """

    path: str
    body: bytes
    expected: int = 200
    content_type: str = "application/json"
    timeout_ms: int | None = None
    disconnect_s: float | None = None
    sends_half: bool = False


class Traffic:
    """Sampler of requests; equal seeds produce equal requests."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._num_new = 0
        self._files = [_jpeg(self._rng, self._pick_size()) for _ in range(_NUM_FILES)]
        self._kinds: tuple[tuple[float, Callable[[], TrafficRequest]], ...] = (
            (0.27, self._caption),
            (0.09, self._caption_form),
            (0.05, self._captions),
            (0.23, self._questions),
            (0.09, self._retrieve_texts),
            (0.09, self._retrieve_images),
            (0.09, self._invalid),
            (0.05, self._disconnect),
            (0.04, self._short_deadline),
        )

    def draw(self) -> list[TrafficRequest]:
        """Sample one request, or a burst of concurrent requests."""
        if self._rng.random() < _SHARE_BURSTS:
            return [self._caption() for _ in range(BURST)]
        shares = [share for share, _ in self._kinds]
        _, make = self._kinds[self._rng.choice(len(shares), p=shares)]
        return [make()]

    def draw_valid(self) -> TrafficRequest:
        """Sample one request that should be answered with 200."""
        makers = (
            self._caption,
            self._caption_form,
            self._questions,
            self._retrieve_texts,
            self._retrieve_images,
        )
        return makers[self._rng.integers(len(makers))]()

    def _caption(self) -> TrafficRequest:
        return _json("/caption", image=self._image(), **self._search())

    def _captions(self) -> TrafficRequest:
        images = [self._image() for _ in range(self._count(8))]
        return _json("/caption", images=images, **self._search())

    def _caption_form(self) -> TrafficRequest:
        files = {"image": ("a.jpg", base64.b64decode(self._image()), "image/jpeg")}
        form = httpx.Request("POST", "http://service", files=files, data={"num_beams": str(self._count(5))})
        return TrafficRequest("/caption", form.read(), content_type=form.headers["Content-Type"])

    def _questions(self) -> TrafficRequest:
        questions = [self._text(12) for _ in range(self._count(8))]
        history = [{"question": self._text(8), "answer": self._text(2)}] if self._rng.random() < 0.2 else []
        return _json("/vqa", image=self._image(), question=questions, history=history, **self._search())

    def _retrieve_texts(self) -> TrafficRequest:
        texts = [self._text(20) for _ in range(self._count(32))]
        return _json("/retrieve", image=self._image(), candidates={"texts": texts})

    def _retrieve_images(self) -> TrafficRequest:
        images = [self._image() for _ in range(self._count(12))]
        return _json("/retrieve", text=self._text(20), candidates={"images": images})

    def _invalid(self) -> TrafficRequest:
        image = self._image()
        data = base64.b64decode(image)
        text_file, cut = (base64.b64encode(data).decode() for data in (b"hello", data[: len(data) // 2]))
        requests = (
            replace(_json("/caption", image="@@@"), expected=422),
            replace(_json("/caption", image=text_file), expected=415),
            replace(_json("/caption", image=cut), expected=422),
            replace(_json("/caption", image=image, num_beams=1000), expected=422),
            replace(_json("/caption", image=image, beams=5), expected=422),
            replace(_json("/caption", images=[image] * 9), expected=413),
            replace(_json("/vqa", image=image, question=""), expected=422),
            replace(_json("/retrieve", text="a", candidates={"texts": ["b"] * 33}), expected=413),
            TrafficRequest("/caption", b"{", expected=400),
            TrafficRequest(
                "/caption", b"image=1", expected=415, content_type="application/x-www-form-urlencoded"
            ),
            TrafficRequest(
                "/caption", b"garbage", expected=400, content_type="multipart/form-data; boundary=b"
            ),
        )
        return requests[self._rng.integers(len(requests))]

    def _disconnect(self) -> TrafficRequest:
        sends_half = self._rng.random() < _SHARE_HALF
        return replace(
            self._caption(), disconnect_s=self._rng.uniform(0, _MAX_DISCONNECT_S), sends_half=sends_half
        )

    def _short_deadline(self) -> TrafficRequest:
        return replace(self._questions(), timeout_ms=int(self._rng.integers(1, _MAX_DEADLINE_MS)))

    def _search(self) -> dict[str, object]:
        return {"num_beams": self._count(8), "max_new_tokens": self._count(30)}

    def _image(self) -> str:
        """Return a repeated file, or a new file with the same pixels, in base64."""
        data = self._files[self._rng.integers(len(self._files))]
        if self._rng.random() > _SHARE_REPEATED:
            self._num_new += 1
            comment = b"\xff\xfe\x00\x0a" + self._num_new.to_bytes(8)
            data = data[:_JPEG_START] + comment + data[_JPEG_START:]
        return base64.b64encode(data).decode()

    def _text(self, max_words: int) -> str:
        return " ".join(self._rng.choice(_WORDS, self._count(max_words)))

    def _count(self, most: int) -> int:
        return int(self._rng.integers(1, most + 1))

    def _pick_size(self) -> tuple[int, int]:
        return _SIZES[self._rng.choice(len(_SIZES), p=_SIZE_WEIGHTS)]


def _jpeg(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    noise = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def _json(path: str, **fields: object) -> TrafficRequest:
    return TrafficRequest(path, json.dumps(fields).encode())
