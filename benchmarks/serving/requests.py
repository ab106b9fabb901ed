"""What the benchmark of the service sends: each request about a picture that no other is about."""

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
_GRAIN = (12, 16, 3)
_SIZE = (320, 240)


@dataclass(frozen=True, slots=True)
class Request:
    """A body of JSON, and what its answer must consist of: so many texts of so many tokens each."""

    path: str
    body: bytes
    num_texts: int
    num_tokens: int


def caption_request(seed: int) -> Request:
    """Asks for a caption of the picture with this seed."""
    return _request("/caption", CAPTION_TOKENS, 1.0, image=picture(seed))


def question_request(seed: int, question: str) -> Request:
    """Asks one question."""
    return _request("/vqa", ANSWER_TOKENS, -1.0, image=picture(seed), question=question)


def questions_request(seed: int, questions: list[str]) -> Request:
    """Asks several questions about one picture at once."""
    return _request("/vqa", ANSWER_TOKENS, -1.0, image=picture(seed), question=questions)


def make_questions(seed: int, count: int) -> list[str]:
    """Gives questions of eight words each."""
    rng = np.random.default_rng([seed, 1])
    words = rng.integers(_FIRST_WORD, _LAST_WORD, (count, _QUESTION_WORDS))
    return [" ".join(f"w{word}" for word in row) for row in words]


def picture(seed: int) -> str:
    """Gives a JPEG of soft blots, some 10 kB, in base64."""
    grain = np.random.default_rng(seed).integers(0, 256, _GRAIN, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grain).resize(_SIZE, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
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
    num_texts = len(question) if isinstance(question, list) else 1
    return Request(path, json.dumps(fields).encode(), num_texts, num_tokens)
