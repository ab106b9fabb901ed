"""Bodies off the wire: JSON and forms give the same request, and what is wrong is said in words."""

import asyncio
import json
import threading
import time
from typing import ClassVar, TypeVar

import pytest
from pydantic import field_validator
from starlette.requests import Request
from starlette.types import Message

from service.api.retrieve_schema import RetrieveRequest
from service.api.routes import BodyReader
from service.api.schemas import Body, CaptionRequest, VqaRequest
from service.errors import (
    BodyTooLargeError,
    DeadlineExceededError,
    InvalidRequestError,
    ServiceError,
    TooManyItemsError,
    UnreadableBodyError,
    UnsupportedContentTypeError,
)
from service.image_decoding import Upload
from service.runtime.readiness import Uploads
from service.runtime.settings import Settings
from tests.service.api.body_reading import FEW, JSON, LIMIT, MAX_VALUES, multipart, read

LARGE = Settings(max_text_chars=20)
B = TypeVar("B", bound=Body)


async def from_json(schema: type[B], fields: object) -> B:
    return await read(schema, json.dumps(fields).encode(), JSON)


async def refusal(schema: type[Body], fields: object) -> ServiceError:
    with pytest.raises(ServiceError) as refused:
        await from_json(schema, fields)
    return refused.value


async def test_json_and_form_give_the_same_request() -> None:
    expected = CaptionRequest(image=Upload(b"\x89PNG"), num_captions=2, do_sample=True, top_p=0.5, seed=7)
    body, headers = multipart(
        [("image", b"\x89PNG")],
        [("num_captions", "2"), ("do_sample", "true"), ("top_p", "0.5"), ("seed", "7")],
    )
    assert await read(CaptionRequest, body, headers) == expected


async def test_a_repeated_image_part_becomes_images() -> None:
    body, headers = multipart([("image", b"one"), ("image", b"two")], [])
    read_back = await read(CaptionRequest, body, headers)
    assert read_back.image is None
    assert read_back.images == [Upload(b"one"), Upload(b"two")]


async def test_lists_repeat_their_field_and_objects_are_json() -> None:
    turn = {"question": "what?", "answer": "a cat"}
    body, headers = multipart(
        [("image", b"one")],
        [("question", "who?"), ("question", "where?"), ("history", json.dumps(turn))],
    )
    read_back = await read(VqaRequest, body, headers)
    assert read_back.question == ["who?", "where?"]
    assert read_back.history[0].answer == "a cat"
    body, headers = multipart([], [("text", "a"), ("candidates", '{"texts": ["b", "c"]}')])
    assert (await read(RetrieveRequest, body, headers)).candidate_texts == ["b", "c"]


async def test_one_question_may_be_a_plain_string() -> None:
    assert (await from_json(VqaRequest, {"image": "x", "question": "who?"})).question == ["who?"]


async def test_a_part_that_may_not_repeat_is_refused_when_it_does() -> None:
    body, headers = multipart([("image", b"x")], [("seed", "1"), ("seed", "2")])
    with pytest.raises(InvalidRequestError, match="seed: is sent 2 times; send it once"):
        await read(CaptionRequest, body, headers)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": "x", "num_beams": "5"}, "num_beams: '5' is not a whole number; send one without quotes"),
        ({"image": "x", "num_beams": 2.5}, "num_beams: 2.5 is not a whole number; send one without quotes"),
        ({"image": "x", "num_beams": True}, "num_beams: True is not a whole number; send one without quotes"),
        ({"image": "x", "top_p": "a"}, "top_p: 'a' is not a number; send one without quotes"),
        ({"image": "x", "do_sample": 1}, "do_sample: 1 is not a truth value; send true or false"),
        ({"image": 5}, "image: is not a string; send the file in base64"),
        ({"images": "x"}, "images: 'x' is not a list; put it in [ and ]"),
        ({"image": "x", "num_beems": 5}, "num_beems: is not a known field; did you mean num_beams?"),
    ],
)
async def test_a_wrong_field_is_told_with_value_and_cure(fields: dict[str, object], message: str) -> None:
    refused = await refusal(CaptionRequest, fields)
    assert isinstance(refused, InvalidRequestError)
    assert refused.detail == message
    assert refused.fields[0].field == next(name for name in reversed(fields))


async def test_a_missing_field_is_told() -> None:
    assert (await refusal(VqaRequest, {"image": "x"})).detail == "question: is required; add it"


async def test_fields_inside_objects_are_checked_too() -> None:
    refused = await refusal(RetrieveRequest, {"text": "a", "candidates": {"image": ["x"]}})
    assert refused.detail == "candidates.image: is not a known field; did you mean images?"
    refused = await refusal(RetrieveRequest, {"text": "a", "candidates": {"texts": ["a"]}, "mode": "best"})
    assert refused.detail == "mode: 'best' is not 'itc', 'itm' or 'rerank'; choose one of them"
    refused = await refusal(RetrieveRequest, {"text": "a", "candidates": '{"texts": ["a"]}'})
    assert "candidates" in refused.detail  # a string of JSON is for forms


async def test_a_long_value_is_not_repeated_whole() -> None:
    refused = await refusal(CaptionRequest, {"image": "x", "num_beams": "9" * 5000})
    assert len(refused.detail) < 200


async def test_a_number_that_is_not_finite_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="top_p: nan is not a finite number"):
        await read(CaptionRequest, b'{"image": "x", "top_p": NaN}', JSON)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"not json", b"\xff\xfe", b'{"image": "\\ud800"}', b"[" * 1000, b"[1]", b'"text"', b"null"],
)
async def test_what_is_no_json_object_is_unreadable(content: bytes) -> None:
    with pytest.raises(UnreadableBodyError, match=r"check its syntax|put the fields between"):
        await read(CaptionRequest, content, JSON)


async def test_a_form_that_is_none_is_unreadable_or_lacks_its_fields() -> None:
    headers = {"content-type": "multipart/form-data; boundary=frontier"}
    with pytest.raises(InvalidRequestError):
        await read(VqaRequest, b"", headers)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "image/png"])
async def test_other_content_types_are_refused_with_those_that_are_taken(kind: str) -> None:
    with pytest.raises(UnsupportedContentTypeError, match="application/json or multipart/form-data"):
        await read(CaptionRequest, b"{}", {"content-type": kind})


async def test_a_body_without_a_content_type_is_read_as_json() -> None:
    assert (await read(CaptionRequest, b'{"image": "x"}', {})).image == Upload("x")


async def test_a_body_over_the_limit_is_refused_whether_it_says_so_or_not() -> None:
    content = json.dumps({"image": "x" * LIMIT}).encode()
    for headers in ({**JSON, "content-length": str(len(content))}, JSON):
        with pytest.raises(BodyTooLargeError, match=rf"the limit is {LIMIT}"):
            await read(CaptionRequest, content, headers)
    body, headers = multipart([("image", b"x" * LIMIT)], [])
    with pytest.raises(BodyTooLargeError):
        await read(CaptionRequest, body, headers)


async def test_an_object_in_a_form_that_is_no_json_is_told_what_to_send() -> None:
    body, headers = multipart([], [("text", "a"), ("candidates", "hello")])
    with pytest.raises(InvalidRequestError) as refused:
        await read(RetrieveRequest, body, headers)
    assert "candidates: 'hello' is not JSON" in refused.value.detail
    assert "send an object in { and }, and repeat the field for a list" in refused.value.detail


async def test_base64_with_escapes_of_ascii_is_read_however_long() -> None:
    image = "+/" * 4000
    content = b'{"image": "%s"}' % image.replace("+", "\\u002B").replace("/", "\\/").encode()
    assert (await read(CaptionRequest, content, JSON, LARGE)).image == Upload(image)


@pytest.mark.parametrize(("num_chars", "is_read"), [(20, True), (500, False)])
async def test_a_long_text_beyond_ascii_is_refused_before_it_is_parsed(num_chars: int, is_read: bool) -> None:
    content = json.dumps({"image": "x" * 70_000, "prompt": "\U0001f600" * num_chars}).encode()
    if is_read:
        assert (await read(CaptionRequest, content, JSON, LARGE)).prompt == "\U0001f600" * num_chars
    else:
        with pytest.raises(InvalidRequestError, match="has 6000 bytes, the limit is 20 characters"):
            await read(CaptionRequest, content, JSON, LARGE)


@pytest.mark.parametrize("encoding", ["identity", ""])
async def test_a_body_that_is_not_encoded_may_say_so(encoding: str) -> None:
    assert (await read(CaptionRequest, b'{"image": "x"}', {**JSON, "content-encoding": encoding})).image


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "identity, gzip", "GZIP", "x" * 1000])
async def test_an_encoded_body_is_refused_by_the_name_of_its_encoding(encoding: str) -> None:
    with pytest.raises(UnsupportedContentTypeError, match="the Content-Encoding is") as refused:
        await read(CaptionRequest, b"{}", {**JSON, "content-encoding": encoding})
    assert len(str(refused.value)) < 150


@pytest.mark.parametrize("num_values", [MAX_VALUES - 1, MAX_VALUES])
@pytest.mark.parametrize("value", ["0", '"a"', '"a, [b] {c}"', r'"\","', "[]", "{}"])
async def test_values_are_counted_outside_strings(value: str, num_values: int) -> None:
    """Each value has a comma before it, or is the first of the list; [] and {} count twice."""
    opened = 2  # { and [
    num_items = (num_values - opened + 1) // (2 if value in ("[]", "{}") else 1)
    content = b'{"images": [%s]}' % ",".join([value] * num_items).encode()
    with pytest.raises(InvalidRequestError):  # it was parsed, and found to be no image
        await read(RetrieveRequest, content, JSON, FEW)
    more = b'{"images": [%s]}' % ",".join([value] * (num_items + 2)).encode()
    if num_values == MAX_VALUES:
        with pytest.raises(TooManyItemsError, match=f"more than {MAX_VALUES} values"):
            await read(RetrieveRequest, more, JSON, FEW)


async def test_several_wrong_fields_are_all_named_but_of_a_list_only_the_first_item() -> None:
    refused = await refusal(CaptionRequest, {"image": "x", "num_beams": "a", "top_p": "b", "beams": 1})
    assert [at.field for at in refused.fields] == ["num_beams", "top_p", "beams"]
    refused = await refusal(CaptionRequest, {"images": ["x", 1, 2, 3]})
    assert [at.field for at in refused.fields] == ["images.1"]


async def test_nothing_of_a_caller_is_repeated_at_length() -> None:
    long = "x" * 5000
    for fields in ({long: 1}, {"image": "x", "prompt": [long] * 9}, {"images": [{long: long}]}):
        refused = await refusal(CaptionRequest, fields)
        assert len(refused.detail) < 500
        assert all(len(at.field) < 80 for at in refused.fields)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
async def test_json_is_read_in_all_encodings_of_unicode(encoding: str) -> None:
    content = json.dumps({"image": "x", "prompt": "ein großes \U0001f600"}, ensure_ascii=False).encode(
        encoding
    )
    assert (await read(CaptionRequest, content, JSON)).prompt == "ein großes \U0001f600"


@pytest.mark.parametrize(
    "content", ['{"image": "x", "prompt": "é"}'.encode("latin-1"), '{"image": "é"}'.encode("utf-16")[:-1]]
)
async def test_json_in_another_encoding_is_unreadable(content: bytes) -> None:
    with pytest.raises(UnreadableBodyError, match=r"unicode|neither utf-16 nor utf-8; send it in utf-8"):
        await read(CaptionRequest, content, JSON)


@pytest.mark.parametrize("value", [5, 5.0])
async def test_a_whole_number_may_have_a_decimal_point(value: float) -> None:
    assert (await from_json(CaptionRequest, {"image": "x", "num_beams": value})).num_beams == 5


class SlowRequest(Body):
    """A body whose validation waits for the test."""

    has_started: ClassVar[threading.Event] = threading.Event()
    may_end: ClassVar[threading.Event] = threading.Event()
    text: str

    @field_validator("text")
    @classmethod
    def wait(cls, value: str) -> str:
        cls.has_started.set()
        cls.may_end.wait(30)
        return value


async def test_the_wait_for_the_parser_of_large_bodies_ends_at_the_deadline() -> None:
    settings = Settings()
    reader, uploads = BodyReader(settings), Uploads(settings.max_upload_bytes)
    content = b'{"text": "a"}' + b" " * 2**20  # more than is parsed at once

    async def read_by(deadline: float | None) -> SlowRequest:
        messages: asyncio.Queue[Message] = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": content, "more_body": False})
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "headers": [(b"content-type", b"application/json")],
        }
        return await reader.read(Request(scope, messages.get), SlowRequest, uploads.open(""), deadline)

    first = asyncio.create_task(read_by(None))
    try:
        assert await asyncio.to_thread(SlowRequest.has_started.wait, 30)
        with pytest.raises(DeadlineExceededError):
            await read_by(time.monotonic() + 0.05)
        assert not first.done()
    finally:
        SlowRequest.may_end.set()
    assert (await first).text == "a"
