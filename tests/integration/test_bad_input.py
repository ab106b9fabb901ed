"""Invalid requests: each has its status and a message with value, limit and cure; the service stays ready."""

from typing import Any

import httpx
import pytest

from tests.integration.pictures import bomb, in_base64, picture

GOOD = in_base64(picture(0))
Case = tuple[str, str, dict[str, Any], int, str, list[str]]  # name, path, body, status, code, words
CAPTION_CASES: list[tuple[str, dict[str, Any], int, str, list[str]]] = [
    ("no image", {}, 422, "invalid_request", ["image or images", "exactly one"]),
    ("no beams", {"image": GOOD, "num_beams": 0}, 422, "invalid_params", ["num_beams is 0", "1 and 16"]),
    ("many beams", {"image": GOOD, "num_beams": 1000}, 422, "invalid_params", ["is 1000", "1 and 16"]),
    ("more captions than beams", {"image": GOOD, "num_captions": 9}, 422, "invalid_params", ["9", "raise"]),
    ("wrong type", {"image": GOOD, "num_beams": "five"}, 422, "invalid_request", ["'five'", "whole number"]),
    ("unknown field", {"image": GOOD, "beams": 5}, 422, "invalid_request", ["did you mean num_beams?"]),
    ("text file", {"image": in_base64(b"hello")}, 415, "unsupported_image", ["JPEG, PNG", "convert"]),
    ("truncated", {"image": in_base64(picture(0)[:2000])}, 422, "invalid_image", ["damaged", "whole"]),
    ("bomb", {"image": in_base64(bomb())}, 422, "invalid_image", ["100 Mpx", "40 Mpx", "downscale"]),
    ("bad base64", {"image": "@@@"}, 422, "invalid_image", ["base64", "alphabet"]),
    ("image URL", {"image": "http://169.254.169.254/"}, 422, "invalid_image", ["not fetched"]),
    ("long prompt", {"image": GOOD, "prompt": "a" * 10_000}, 422, "invalid_request", ["10000", "2000"]),
    ("too many tokens", {"image": GOOD, "max_new_tokens": 5000}, 422, "invalid_prompt", ["5000", "96"]),
    ("too many images", {"images": [GOOD] * 33}, 413, "too_many_items", ["33", "32", "BLIP2_MAX_IMAGES"]),
]
OTHER_CASES: list[Case] = [
    ("empty question", "/vqa", {"image": GOOD, "question": ""}, 422, "invalid_request", ["empty"]),
    ("no question", "/vqa", {"image": GOOD}, 422, "invalid_request", ["question", "required"]),
    (
        "long question", "/vqa", {"image": GOOD, "question": "why " * 2500}, 422, "invalid_request",
        ["10000 characters", "2000", "shorten"],
    ),
    (
        "template without a place", "/vqa", {"image": GOOD, "question": "why", "prompt_template": "Q:"}, 422,
        "invalid_prompt", ["'Q:'", "exactly one {}"],
    ),
    ("no candidates", "/retrieve", {"text": "a"}, 422, "invalid_request", ["candidates", "required"]),
    (
        "itm of two texts", "/retrieve", {"text": "a", "candidates": {"texts": ["b"]}, "mode": "itm"}, 422,
        "invalid_request", ["use itc"],
    ),
    (
        "a gallery", "/retrieve", {"text": "a", "gallery": "g"}, 422, "invalid_request",
        ["gallery: is not a known field"],
    ),
    (
        "too many candidates", "/retrieve", {"text": "a", "candidates": {"texts": ["b"] * 1001}}, 413,
        "too_many_items", ["1001", "1000", "BLIP2_MAX_CANDIDATES"],
    ),
]  # fmt: skip
ALL_CASES: list[Case] = [(case[0], "/caption", *case[1:]) for case in CAPTION_CASES] + OTHER_CASES


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "words"),
    [case[1:] for case in ALL_CASES],
    ids=[case[0] for case in ALL_CASES],
)
def test_bad_input_is_refused_with_value_limit_and_cure(
    client: httpx.Client, path: str, body: dict[str, Any], status: int, code: str, words: list[str]
) -> None:
    response = client.post(path, json=body)
    problem = response.json()
    assert (response.status_code, problem["code"]) == (status, code), problem
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["request_id"] == response.headers["x-request-id"]
    for word in words:
        assert word in problem["detail"]
    assert client.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"\xff\xfe\x00", "application/json", 400),
        (b'{"image": "\\ud800"}', "application/json", 400),
        (b"image=1", "application/x-www-form-urlencoded", 415),
        (b"garbage", "multipart/form-data", 400),
        (b"garbage", "multipart/form-data; boundary=frontier", 400),
        (b"--frontier\r\nno header", "multipart/form-data; boundary=frontier", 400),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(
    client: httpx.Client, content: bytes, kind: str, status: int
) -> None:
    response = client.post("/caption", content=content, headers={"Content-Type": kind})
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert client.get("/readyz").status_code == 200


def test_a_body_over_the_limit_is_refused_while_it_comes(client: httpx.Client) -> None:
    endless = (b" " * 2**20 for _ in range(80))
    headers = {"Content-Type": "application/json"}
    response = client.post("/caption", content=endless, headers=headers)
    assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
    response = client.post("/caption", content=b" " * (65 * 2**20), headers=headers)
    assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
    assert client.get("/readyz").status_code == 200


def test_an_image_over_the_limit_is_refused(client: httpx.Client) -> None:
    response = client.post("/caption", files={"image": b"\xff\xd8\xff" + bytes(21 * 2**20)})
    assert (response.status_code, response.json()["code"]) == (413, "image_too_large")


def test_after_all_of_that_the_service_still_answers(client: httpx.Client) -> None:
    assert client.post("/caption", json={"image": GOOD}).status_code == 200
