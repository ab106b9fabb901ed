"""What the soak test sends: good requests of all kinds and sizes, bad ones, and callers who do not wait."""

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
_NUM_KNOWN = 40
_SHARE_KNOWN = 0.5
_SHARE_BURSTS = 0.01
_SHARE_HALF = 0.3
_HANG_UP_S = 0.2
_HURRY_MS = 100
_JPEG_START = 2  # bytes, behind which a comment may stand
_WORDS = ("what", "color", "is", "the", "large", "striped", "red", "star", "circle", "left", "of", "above")


@dataclass(frozen=True, slots=True)
class Errand:
    """One request. expected: the status it has unless it is shed, or expires where timeout_ms is set.

    hang_up_s: the caller closes the connection so long after sending; None: waits for the answer. half: of
    the body is all that is sent before.
    """

    path: str
    body: bytes
    expected: int = 200
    content_type: str = "application/json"
    timeout_ms: int | None = None
    hang_up_s: float | None = None
    half: bool = False


class Errands:
    """Draws errands; equal seeds, equal errands."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._num_fresh = 0
        self._files = [_jpeg(self._rng, self._pick_size()) for _ in range(_NUM_KNOWN)]
        self._kinds: tuple[tuple[float, Callable[[], Errand]], ...] = (
            (0.27, self._caption),
            (0.09, self._caption_form),
            (0.05, self._captions),
            (0.23, self._questions),
            (0.09, self._retrieve_texts),
            (0.09, self._retrieve_images),
            (0.09, self._bad),
            (0.05, self._hang_up),
            (0.04, self._hurry),
        )

    def draw(self) -> list[Errand]:
        """Gives one errand, or a burst of them that are to be run at once."""
        if self._rng.random() < _SHARE_BURSTS:
            return [self._caption() for _ in range(BURST)]
        shares = [share for share, _ in self._kinds]
        _, make = self._kinds[self._rng.choice(len(shares), p=shares)]
        return [make()]

    def _caption(self) -> Errand:
        return _json("/caption", image=self._image(), **self._search())

    def _captions(self) -> Errand:
        images = [self._image() for _ in range(self._count(8))]
        return _json("/caption", images=images, **self._search())

    def _caption_form(self) -> Errand:
        files = {"image": ("a.jpg", base64.b64decode(self._image()), "image/jpeg")}
        form = httpx.Request("POST", "http://service", files=files, data={"num_beams": str(self._count(5))})
        return Errand("/caption", form.read(), content_type=form.headers["Content-Type"])

    def _questions(self) -> Errand:
        questions = [self._text(12) for _ in range(self._count(8))]
        history = [{"question": self._text(8), "answer": self._text(2)}] if self._rng.random() < 0.2 else []
        return _json("/vqa", image=self._image(), question=questions, history=history, **self._search())

    def _retrieve_texts(self) -> Errand:
        texts = [self._text(20) for _ in range(self._count(32))]
        return _json("/retrieve", image=self._image(), candidates={"texts": texts})

    def _retrieve_images(self) -> Errand:
        images = [self._image() for _ in range(self._count(12))]
        return _json("/retrieve", text=self._text(20), candidates={"images": images})

    def _bad(self) -> Errand:
        image = self._image()
        whole = base64.b64decode(image)
        text_file, cut = (base64.b64encode(data).decode() for data in (b"hello", whole[: len(whole) // 2]))
        errands = (
            replace(_json("/caption", image="@@@"), expected=422),
            replace(_json("/caption", image=text_file), expected=415),
            replace(_json("/caption", image=cut), expected=422),
            replace(_json("/caption", image=image, num_beams=1000), expected=422),
            replace(_json("/caption", image=image, beams=5), expected=422),
            replace(_json("/caption", images=[image] * 9), expected=413),
            replace(_json("/vqa", image=image, question=""), expected=422),
            replace(_json("/retrieve", text="a", candidates={"texts": ["b"] * 33}), expected=413),
            Errand("/caption", b"{", expected=400),
            Errand("/caption", b"image=1", expected=415, content_type="application/x-www-form-urlencoded"),
            Errand("/caption", b"garbage", expected=400, content_type="multipart/form-data; boundary=b"),
        )
        return errands[self._rng.integers(len(errands))]

    def _hang_up(self) -> Errand:
        half = self._rng.random() < _SHARE_HALF
        return replace(self._caption(), hang_up_s=self._rng.uniform(0, _HANG_UP_S), half=half)

    def _hurry(self) -> Errand:
        return replace(self._questions(), timeout_ms=int(self._rng.integers(1, _HURRY_MS)))

    def _search(self) -> dict[str, object]:
        return {"num_beams": self._count(8), "max_new_tokens": self._count(30)}

    def _image(self) -> str:
        """Gives a file that was sent before, or the same pixels in a file that never was, in base64."""
        data = self._files[self._rng.integers(len(self._files))]
        if self._rng.random() > _SHARE_KNOWN:
            self._num_fresh += 1
            comment = b"\xff\xfe\x00\x0a" + self._num_fresh.to_bytes(8)
            data = data[:_JPEG_START] + comment + data[_JPEG_START:]
        return base64.b64encode(data).decode()

    def _text(self, max_words: int) -> str:
        return " ".join(self._rng.choice(_WORDS, self._count(max_words)))

    def _count(self, most: int) -> int:
        return int(self._rng.integers(1, most + 1))

    def _pick_size(self) -> tuple[int, int]:
        return _SIZES[self._rng.choice(len(_SIZES), p=_SIZE_WEIGHTS)]


def _jpeg(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    grain = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grain).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def _json(path: str, **fields: object) -> Errand:
    return Errand(path, json.dumps(fields).encode())
