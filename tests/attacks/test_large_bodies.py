"""Bodies near the limit that cost most to parse: each is refused in seconds, in little memory."""

import time

import httpx
import pytest

from tests.attacks.harness import MemoryWatch, bystander
from tests.integration.processes import ServiceProcess

SIZE = 60 * 2**20  # the limit is 64 MiB
MAX_S = 10.0  # a caller's own time to send it included
MAX_FACTOR = 4
SLACK_BYTES = 64 * 2**20
MAX_ERROR_BYTES = 8000

JSON = "application/json"
FORM = "multipart/form-data; boundary=X"
FILE = b'--X\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
TEXT = b'--X\r\nContent-Disposition: form-data; name="candidates"\r\n\r\n'
WIDE = b'--X\r\nContent-Disposition: form-data; name="text"\r\n\r\n'
END = b"\r\n--X--\r\n"


def filled(start: bytes, repeated: bytes, end: bytes) -> bytes:
    return start + repeated * (SIZE // len(repeated)) + end


def unknown_keys() -> bytes:
    keys = b",".join(b'"%d%s":1' % (index, b"k" * (SIZE // 4000)) for index in range(4000))
    return b"{" + keys + b"}"


MANY, LARGE = (413, "too_many_items"), (413, "image_too_large")
UNREADABLE, INVALID = (400, "unreadable_body"), (422, "invalid_request")
BODIES = [
    ("zeros", "/caption", JSON, filled(b'{"images":[', b"0,", b"0]}"), MANY),
    ("empty texts", "/vqa", JSON, filled(b'{"image":"a","question":[', b'"",', b'""]}'), MANY),
    ("objects", "/vqa", JSON, filled(b'{"history":[', b"{},", b"{}]}"), MANY),
    ("repeated keys", "/caption", JSON, filled(b"{", b'"image":"a",', b'"image":"a"}'), MANY),
    ("deep nesting", "/caption", JSON, filled(b'{"image":', b"[", b""), MANY),
    ("strings side by side", "/caption", JSON, filled(b'{"images":[', b'""', b"]}"), UNREADABLE),
    ("one unknown key", "/caption", JSON, filled(b'{"', b"k", b'":1}'), INVALID),
    ("4000 unknown keys", "/caption", JSON, unknown_keys(), INVALID),
    ("escaped quotes", "/caption", JSON, filled(b'{"image":",,', b'\\"', b"," * 9999 + b'"}'), LARGE),
    ("commas in a string", "/caption", JSON, filled(b'{"image":"', b",", b'"}'), LARGE),
    ("wide characters", "/caption", JSON, filled(b'{"prompt":"\\ud83d\\ude00', b"A", b'"}'), INVALID),
    ("wide escapes", "/caption", JSON, filled(b'{"image":"', b"\\ud83d\\ude00", b'"}'), INVALID),
    ("huge number", "/caption", JSON, filled(b'{"num_beams":', b"1", b"}"), UNREADABLE),
    ("NUL", "/caption", JSON, filled(b"", b"\0", b""), UNREADABLE),
    ("no UTF-8", "/caption", JSON, filled(b'{"image":"\xff', b"A", b'"}'), INVALID),
    ("form: no boundaries", "/caption", FORM, filled(FILE, b"\r\n--Xa", END), MANY),
    ("form: half boundaries", "/caption", FORM, filled(FILE, b"\r\n--", END), LARGE),
    ("form: empty parts", "/caption", FORM, filled(b"", FILE + b"\r\n", END), MANY),
    ("form: zeros", "/retrieve", FORM, filled(TEXT + b'{"texts":[', b"0,", b"0]}" + END), MANY),
    ("form: wide text", "/retrieve", FORM, filled(WIDE, "é".encode(), END), INVALID),
]


@pytest.mark.serial
@pytest.mark.parametrize(
    ("path", "content_type", "body", "expected"),
    [body[1:] for body in BODIES],
    ids=[b[0] for b in BODIES],
)
def test_the_costliest_bodies_are_refused_soon_and_in_little_memory(
    attacked: ServiceProcess, path: str, content_type: str, body: bytes, expected: tuple[int, str]
) -> None:
    with bystander(attacked), MemoryWatch(attacked) as memory:
        started = time.monotonic()
        answer = httpx.post(
            attacked.url + path, content=body, headers={"Content-Type": content_type}, timeout=120
        )
        seconds = time.monotonic() - started
    assert (answer.status_code, answer.json()["code"]) == expected, answer.text[:500]
    assert len(answer.content) < MAX_ERROR_BYTES
    assert seconds < MAX_S
    assert memory.growth_bytes < MAX_FACTOR * len(body) + SLACK_BYTES


@pytest.mark.parametrize(("num_values", "status"), [(1000, 200), (1001, 413), (5000, 413)])
def test_as_many_candidates_as_allowed_are_read_whatever_they_contain(
    attacked: ServiceProcess, num_values: int, status: int
) -> None:
    texts = ['a "quoted" text, with [brackets], {braces} and \\']
    body = {"text": "a", "candidates": {"texts": texts * num_values}}
    answer = httpx.post(f"{attacked.url}/retrieve", json=body, timeout=60)
    assert answer.status_code == status, answer.text[:500]
