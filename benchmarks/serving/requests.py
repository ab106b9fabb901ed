"""Requests of the serving benchmark, each about its own image."""

import base64
import io
import json
from dataclasses import dataclass

import numpy as np
from PIL import Image

CAPTION_TOKENS = 20
ANSWER_TOKENS = 10
NUM_BEAMS = 5
_QUESTION_WORDS = 8
_FIRST_WORD, _LAST_WORD = 4, 50000  # of the random checkpoint's vocabulary
_NOISE_SHAPE = (12, 16, 3)
_SIZE = (320, 240)


@dataclass(frozen=True, slots=True)
class Request:
    """A JSON body, with the number and the length of the texts that the response must contain."""

    path: str
    body: bytes
    num_outputs: int
    num_tokens: int


def caption_request(seed: int) -> Request:
    """Build a request for a caption."""
    return _request("/caption", CAPTION_TOKENS, 1.0, image=random_image(seed))


def question_request(seed: int, question: str) -> Request:
    """Build a request with one question."""
    return _request("/vqa", ANSWER_TOKENS, -1.0, image=random_image(seed), question=question)


def questions_request(seed: int, questions: list[str]) -> Request:
    """Build a request with several questions about one image."""
    return _request("/vqa", ANSWER_TOKENS, -1.0, image=random_image(seed), question=questions)


def make_questions(seed: int, count: int) -> list[str]:
    """Return random questions of eight words each."""
    rng = np.random.default_rng([seed, 1])
    words = rng.integers(_FIRST_WORD, _LAST_WORD, (count, _QUESTION_WORDS))
    return [" ".join(f"w{word}" for word in row) for row in words]


def random_image(seed: int) -> str:
    """Return a random smooth JPEG of about 10 kB, in base64."""
    noise = np.random.default_rng(seed).integers(0, 256, _NOISE_SHAPE, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(_SIZE, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()


def _request(
    path: str, num_tokens: int, length_penalty: float, *, image: str, question: str | list[str] = ""
) -> Request:
    fields: dict[str, object] = {
        "image": image,
        "num_beams": NUM_BEAMS,
        "max_new_tokens": num_tokens,
        "min_new_tokens": num_tokens,
        "length_penalty": length_penalty,
    }
    if question:
        fields["question"] = question
    num_outputs = len(question) if isinstance(question, list) else 1
    return Request(path, json.dumps(fields).encode(), num_outputs, num_tokens)
