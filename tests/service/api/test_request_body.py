"""Bodies off the wire: JSON and forms give the same request, and what is wrong is said in words."""

import asyncio
import json
import threading
import time
from collections.abc import Mapping
from typing import ClassVar, TypeVar

import pytest
from pydantic import field_validator
from starlette.requests import Request
from starlette.types import Message

from service.api.request_body import BodyReader
from service.api.schemas import Body, CaptionRequest, RetrieveRequest, VqaRequest
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

LIMIT = 10_000
SETTINGS = Settings(max_body_bytes=LIMIT, max_image_bytes=LIMIT)
LARGE = Settings(max_text_chars=20)
FEW = Settings(max_images=3, max_questions=3, max_candidates=3)
JSON = {"content-type": "application/json"}
B = TypeVar("B", bound=Body)


async def read(
    schema: type[B], content: bytes, headers: Mapping[str, str], settings: Settings = SETTINGS
) -> B:
    """Read a body that comes in chunks."""
    chunks = [content[start : start + 100] for start in range(0, len(content), 100)] or [b""]

    async def receive() -> Message:
        body = chunks.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(chunks)}

    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": raw}
    lease = Uploads(settings.max_upload_bytes).open("")
    return await BodyReader(settings).read(Request(scope, receive), schema, lease, None)


async def from_json(schema: type[B], fields: object) -> B:
    return await read(schema, json.dumps(fields).encode(), JSON)


async def refusal(schema: type[Body], fields: object) -> ServiceError:
    with pytest.raises(ServiceError) as refused:
        await from_json(schema, fields)
    return refused.value


def multipart(files: list[tuple[str, bytes]], fields: list[tuple[str, str]]) -> tuple[bytes, dict[str, str]]:
    lines = []
    for name, value in fields:
        lines.append(
            b'--frontier\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
            % (name.encode(), value.encode())
        )
    for name, data in files:
        lines.append(
            b'--frontier\r\nContent-Disposition: form-data; name="%s"; filename="f.png"\r\n'
            b"Content-Type: image/png\r\n\r\n%s\r\n" % (name.encode(), data)
        )
    return b"".join([*lines, b"--frontier--\r\n"]), {"content-type": "multipart/form-data; boundary=frontier"}


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
        ({"image": "x", "num_beams": None}, "num_beams: None is not a whole number; send one without quotes"),
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


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "x" * 1000])
async def test_an_encoded_body_is_refused_by_the_name_of_its_encoding(encoding: str) -> None:
    with pytest.raises(UnsupportedContentTypeError, match="the Content-Encoding is") as refused:
        await read(CaptionRequest, b"{}", {**JSON, "content-encoding": encoding})
    assert len(str(refused.value)) < 150


MAX_VALUES = 4 * 3 + 256


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


@pytest.mark.parametrize("value", [5, 5.0])
async def test_a_whole_number_may_have_a_decimal_point(value: float) -> None:
    assert (await from_json(CaptionRequest, {"image": "x", "num_beams": value})).num_beams == 5


IMAGE_PART = b'--X\r\nContent-Disposition: form-data; name="image"; filename="f"\r\n\r\ndata\r\n'
FORM_END = b"--X--\r\n"


def text_part(name: bytes, value: bytes, content_type: bytes = b"") -> bytes:
    kind = b"Content-Type: %s\r\n" % content_type if content_type else b""
    return b'--X\r\nContent-Disposition: form-data; name="%s"\r\n%s\r\n%s\r\n' % (name, kind, value)


async def read_form(content: bytes, parameters: str = "boundary=X") -> CaptionRequest:
    return await read(CaptionRequest, content, {"content-type": f"multipart/form-data; {parameters}"})


CODECS = [
    "utf-16",
    "utf-7",
    "idna",
    "punycode",
    "undefined",
    "hex",
    "unicode_escape",
    "nonsense",
    "",
    "x" * 999,
]


@pytest.mark.parametrize("charset", CODECS)
async def test_a_form_in_another_charset_is_refused_wherever_it_says_so(charset: str) -> None:
    whole = IMAGE_PART + text_part(b"prompt", b"a") + FORM_END
    in_part = IMAGE_PART + text_part(b"prompt", b"a", b"text/plain; charset=" + charset.encode()) + FORM_END
    in_field = text_part(b"_charset_", charset.encode()) + whole
    for content, parameters in (
        (whole, f"charset={charset}; boundary=X"),
        (whole, f"charset=utf-8; charset={charset}; boundary=X"),
        (in_part, "boundary=X"),
        (in_field, "boundary=X"),
    ):
        with pytest.raises(UnreadableBodyError, match=r"the charset is '.{0,61}; send the form in utf-8"):
            await read_form(content, parameters)


@pytest.mark.parametrize(
    ("charset", "text", "prompt"),
    [("utf-8", b"caf\xc3\xa9", "café"), ("UTF8", b"a", "a"), ("iso-8859-1", b"caf\xe9", "café")],
)
async def test_a_form_may_name_a_usual_charset(charset: str, text: bytes, prompt: str) -> None:
    content = IMAGE_PART + text_part(b"prompt", text) + FORM_END
    assert (await read_form(content, f"charset={charset}; boundary=X")).prompt == prompt
    content = IMAGE_PART + text_part(b"prompt", text, b"text/plain; charset=" + charset.encode()) + FORM_END
    assert (await read_form(content)).prompt == prompt


@pytest.mark.parametrize("num_bytes_cut", [3, 4, 5, 6, 7, 10, 60, 100])
async def test_a_form_that_is_cut_off_is_never_read(num_bytes_cut: int) -> None:
    content = IMAGE_PART + text_part(b"prompt", b"a photo") + FORM_END
    with pytest.raises(UnreadableBodyError):
        await read_form(content[:-num_bytes_cut])
    assert (await read_form(content[:-2])).prompt == "a photo"  # the last line break may be left out


@pytest.mark.parametrize(
    "content",
    [
        IMAGE_PART + text_part(b"prompt", b"\xff") + FORM_END,
        text_part(b"\xff", b"a") + FORM_END,
        b"--X\r\nContent-Disposition: form-data\r\n\r\na\r\n" + FORM_END,
        b"--X\r\nContent-Type: text/plain\r\n\r\na\r\n" + FORM_END,
        b"--X\r\n\r\na\r\n" + FORM_END,
        IMAGE_PART.replace(b"\r\n", b"\n") + FORM_END,
    ],
)
async def test_a_malformed_form_is_unreadable(content: bytes) -> None:
    with pytest.raises(UnreadableBodyError):
        await read_form(content)


async def test_values_may_be_file_parts_and_a_list_may_be_one_part() -> None:
    blob = b'--X\r\nContent-Disposition: form-data; name="%s"; filename="blob"\r\n'
    blob += b"Content-Type: application/json\r\n\r\n%s\r\n"
    turns = b'[{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]'
    content = (
        IMAGE_PART + blob % (b"history", turns) + blob % (b"num_beams", b"2") + blob % (b"question", b"e")
    )
    headers = {"content-type": "multipart/form-data; boundary=X"}
    body = await read(VqaRequest, content + FORM_END, headers)
    assert ([turn.answer for turn in body.history], body.num_beams, body.question) == (["b", "d"], 2, ["e"])


async def test_an_unknown_part_is_named_as_such_however_often_it_is_sent() -> None:
    part = IMAGE_PART.replace(b'"image"', b'"images[]"')
    for num_parts in (1, 2):
        with pytest.raises(InvalidRequestError, match="is not a known field; did you mean images"):
            await read_form(part * num_parts + FORM_END)


@pytest.mark.parametrize(
    ("num_parts", "error"), [(MAX_VALUES, InvalidRequestError), (MAX_VALUES + 1, TooManyItemsError)]
)
async def test_a_form_has_at_most_as_many_parts_as_values(num_parts: int, error: type[ServiceError]) -> None:
    content = b"".join(text_part(b"a%d" % index, b"") for index in range(num_parts)) + FORM_END
    with pytest.raises(ServiceError) as refused:
        await read(CaptionRequest, content, {"content-type": "multipart/form-data; boundary=X"}, FEW)
    assert type(refused.value) is error


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
