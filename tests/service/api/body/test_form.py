"""Forms as browsers, curl and HTTP libraries write them, and forms that are damaged."""

import json

import pytest

from service.api.retrieve_schema import RetrieveRequest
from service.api.schemas import CaptionRequest, VqaRequest
from service.errors import (
    InvalidRequestError,
    ServiceError,
    TooManyItemsError,
    UnreadableBodyError,
)
from service.image_decoding import Upload
from tests.service.api.body_reading import FEW, MAX_VALUES, B, read

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF"
BASE64 = b"iVBORw0KGgo="
FORM = {"content-type": "multipart/form-data; boundary=X"}
IMAGE_PART = b'--X\r\nContent-Disposition: form-data; name="image"; filename="f"\r\n\r\ndata\r\n'
FORM_END = b"--X--\r\n"


def text_part(name: bytes, value: bytes, content_type: bytes = b"") -> bytes:
    kind = b"Content-Type: %s\r\n" % content_type if content_type else b""
    return b'--X\r\nContent-Disposition: form-data; name="%s"\r\n%s\r\n%s\r\n' % (name, kind, value)


def part(name: str, data: bytes, *headers: str, disposition: str = "") -> bytes:
    """Return one part, its Content-Disposition with further parameters."""
    lines = [f'Content-Disposition: form-data; name="{name}"{disposition}', *headers]
    return b"".join([b"--X\r\n", "\r\n".join(lines).encode(), b"\r\n\r\n", data, b"\r\n"])


async def read_parts(schema: type[B], *parts: bytes) -> B:
    return await read(schema, b"".join(parts) + FORM_END, FORM)


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
    part = IMAGE_PART.replace(b'"image"', b'"imags[]"')
    for num_parts in (1, 2):
        with pytest.raises(InvalidRequestError, match=r"imags\[\]: is not a known field; did you mean image"):
            await read_form(part * num_parts + FORM_END)


@pytest.mark.parametrize(
    ("num_parts", "error"), [(MAX_VALUES, InvalidRequestError), (MAX_VALUES + 1, TooManyItemsError)]
)
async def test_a_form_has_at_most_as_many_parts_as_values(num_parts: int, error: type[ServiceError]) -> None:
    content = b"".join(text_part(b"a%d" % index, b"") for index in range(num_parts)) + FORM_END
    with pytest.raises(ServiceError) as refused:
        await read(CaptionRequest, content, {"content-type": "multipart/form-data; boundary=X"}, FEW)
    assert type(refused.value) is error


@pytest.mark.parametrize(
    "data", [PNG, JPEG, b"GIF89a\x01\x00\x01\x00", b"BM\x9a\x00\x00\x00", b"II*\x00\x08"]
)
@pytest.mark.parametrize(
    ("disposition", "headers"),
    [
        ("", ()),
        ("", ("Content-Type: image/png",)),
        ("", ("Content-Type: text/plain",)),
        ("", ("Content-Type: application/octet-stream",)),
        ("", ("Content-Type: application/json",)),
        ('; filename="a.png"', ()),
        ("; filename=a.png", ("content-type: IMAGE/PNG",)),
        ("; filename*=UTF-8''%E2%82%AC.png", ()),
        ("; FileName*=utf-8'en'a.png", ("Content-Type: image/png",)),
        ('; filename="€;.png"', ("Content-Type: image/png", "Content-Length: 8")),
        ("; filename=\"a.png\"; filename*=utf-8''a.png", ("Content-Transfer-Encoding: binary",)),
        ('; filename=""', ("Content-Type: application/octet-stream",)),
    ],
)
async def test_an_image_file_is_known_with_or_without_its_name(
    disposition: str, headers: tuple[str, ...], data: bytes
) -> None:
    body = await read_parts(CaptionRequest, part("image", data, *headers, disposition=disposition))
    assert body.image == Upload(data)


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("Content-Type: text/plain; charset=utf-8",),
        ("Content-Transfer-Encoding: base64", "Content-Type: image/png"),
    ],
)
@pytest.mark.parametrize("text", [BASE64, b"data:image/png;base64," + BASE64])
async def test_an_image_may_be_text_in_a_form_too(headers: tuple[str, ...], text: bytes) -> None:
    assert (await read_parts(CaptionRequest, part("image", text, *headers))).image == Upload(text.decode())
    both = [part("images", text, *headers), part("images", PNG, disposition='; filename="a"')]
    assert (await read_parts(CaptionRequest, *both)).images == [Upload(text.decode()), Upload(PNG)]


BLOB = '; filename="blob"'
AS_JSON = "Content-Type: application/json"


@pytest.mark.parametrize("headers", [(AS_JSON,), (AS_JSON + "; charset=utf-8",), ()])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
async def test_fields_may_be_blobs_of_json(headers: tuple[str, ...], mark: bytes) -> None:
    def blob(name: str, value: object) -> bytes:
        data = mark + json.dumps(value, ensure_ascii=False).encode()
        return part(name, data, *headers, disposition=BLOB)

    image = part("image", PNG)
    turns = [{"question": "größe?", "answer": "b"}, {"question": "c", "answer": "d"}]
    for sent in (blob("history", turns), blob("history", turns[0]) + blob("history", turns[1])):
        body = await read_parts(
            VqaRequest,
            image,
            sent,
            blob("num_beams", 3),
            blob("early_stopping", True),
            part("question", b"q"),
        )
        assert [turn.model_dump() for turn in body.history] == turns
        assert (body.num_beams, body.early_stopping) == (3, True)
    ranked = await read_parts(RetrieveRequest, image, blob("candidates", {"texts": ["ü", "b"]}))
    assert ranked.candidate_texts == ["ü", "b"]


async def test_texts_may_be_blobs_of_json_or_look_like_json() -> None:
    def blob(name: str, data: bytes) -> bytes:
        return part(name, data, AS_JSON, disposition=BLOB)

    image = part("image", PNG)
    for name, text in (("question", b"true"), ("question", b"5"), ("question", b"who?"), ("question", b'{"')):
        assert (await read_parts(VqaRequest, image, part(name, text))).question == [text.decode()]
        assert (await read_parts(VqaRequest, image, blob(name, text))).question == [text.decode()]
    assert (await read_parts(VqaRequest, image, blob("question", b'"who?"'))).question == ["who?"]
    assert (await read_parts(VqaRequest, image, blob("question", b'["a", "b"]'))).question == ["a", "b"]
    assert (await read_parts(VqaRequest, image, part("question", b'["a"]'))).question == ['["a"]']
    assert (await read_parts(CaptionRequest, blob("image", b'"%s"' % BASE64))).image == Upload(
        BASE64.decode()
    )


EMPTY_FILE = ("Content-Type: application/octet-stream",)


async def test_what_an_html_form_sends_for_fields_left_empty_is_absent() -> None:
    names = set(CaptionRequest.model_fields) - {"image"}
    empty = [part(name, b"") for name in names]
    no_file = part("images", b"", *EMPTY_FILE, disposition='; filename=""')
    body = await read_parts(CaptionRequest, part("image", PNG), *empty, no_file)
    assert body == CaptionRequest(image=Upload(PNG))
    assert body.model_fields_set == {"image"}
    asked = await read_parts(
        VqaRequest,
        part("image", PNG),
        *[part("question", text) for text in (b"", b"a", b"", b"b")],
        part("history", b""),
    )
    assert (asked.question, asked.history) == (["a", "b"], [])


async def test_a_required_field_left_empty_is_named() -> None:
    no_file = part("image", b"", *EMPTY_FILE, disposition='; filename=""')
    with pytest.raises(InvalidRequestError, match="image: is required; add it; question: is required"):
        await read_parts(VqaRequest, no_file, part("question", b""))
    named = part("image", b"", disposition='; filename="a.png"')
    assert (await read_parts(CaptionRequest, named)).image == Upload(b"")  # decoding says that it is empty


@pytest.mark.parametrize(
    ("value", "expected"), [("on", True), ("True", True), ("1", True), ("off", False), ("false", False)]
)
async def test_a_truth_value_may_be_that_of_a_check_box(value: str, expected: bool) -> None:
    body = await read_parts(CaptionRequest, part("image", PNG), part("logprobs", value.encode()))
    assert body.logprobs is expected


@pytest.mark.parametrize("value", ["5", "5.0", " 5 "])
async def test_a_whole_number_of_a_form_may_have_a_decimal_point(value: str) -> None:
    body = await read_parts(CaptionRequest, part("image", PNG), part("num_beams", value.encode()))
    assert body.num_beams == 5


@pytest.mark.parametrize(
    "names",
    [
        ("images", "images"),
        ("image", "image"),
        ("images[]", "images[]"),
        ("image[]", "image[]"),
        ("images[0]", "images[1]"),
        ("image[0]", "image[1]"),
        ("images[]", "images"),
    ],
)
async def test_the_names_of_lists_may_have_brackets(names: tuple[str, str]) -> None:
    first, second = names
    body = await read_parts(CaptionRequest, part(first, PNG), part(second, JPEG))
    assert body.images == [Upload(PNG), Upload(JPEG)]


async def test_one_part_may_be_named_as_a_list() -> None:
    assert (await read_parts(CaptionRequest, part("images[]", PNG))).images == [Upload(PNG)]
    body = await read_parts(VqaRequest, part("image[]", PNG), part("question[]", b"a"), part("seed[]", b"1"))
    assert (body.image, body.question, body.seed) == (Upload(PNG), ["a"], 1)


async def test_indices_order_a_list_whatever_the_order_of_its_parts() -> None:
    parts = [part(f"question[{index}]", str(index).encode()) for index in (10, 2, 0, 1)]
    assert (await read_parts(VqaRequest, part("image", PNG), *parts)).question == ["0", "1", "2", "10"]


@pytest.mark.parametrize(
    "name", ["images[", "images]", "[]", "[images]", "images[a]", "images[-1]", "images[9999999]"]
)
async def test_other_brackets_are_unknown_fields(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="is not a known field") as refused:
        await read_parts(CaptionRequest, part(name, PNG))
    assert refused.value.fields[0].field == name


@pytest.mark.parametrize(
    "name",
    [
        "images",
        "images[]",
        "candidates",
        "candidates[]",
        "candidates.images",
        "candidates[images]",
        "candidates[images][]",
        "candidates[images][0]",
    ],
)
@pytest.mark.parametrize("disposition", ["", '; filename="a.png"'])
async def test_candidate_images_may_be_file_parts(name: str, disposition: str) -> None:
    files = [part(name, data, disposition=disposition) for data in (PNG, JPEG)]
    body = await read_parts(RetrieveRequest, part("text", b"a"), *files)
    assert body.candidate_images == [Upload(PNG), Upload(JPEG)]
    assert body.candidates.texts is None
    single = await read_parts(RetrieveRequest, part("text", b"a"), files[1])
    assert single.candidate_images == [Upload(JPEG)]


@pytest.mark.parametrize(
    "name", ["texts", "texts[]", "candidates.texts", "candidates[texts]", "candidates[texts][]"]
)
async def test_candidate_texts_may_be_parts(name: str) -> None:
    body = await read_parts(RetrieveRequest, part("image", PNG), part(name, b"a"), part(name, "ü".encode()))
    assert body.candidate_texts == ["a", "ü"]
    assert body.candidates.images is None


async def test_candidates_may_be_json_and_parts() -> None:
    members = part("candidates", b'{"images": ["%s"]}' % BASE64)
    for parts in ((members, part("images", PNG)), (part("images", PNG), members)):
        body = await read_parts(RetrieveRequest, part("text", b"a"), *parts)
        assert body.candidate_images == [Upload(BASE64.decode()), Upload(PNG)]


async def test_images_and_texts_are_names_of_candidates_in_retrieve_alone() -> None:
    with pytest.raises(InvalidRequestError, match="texts: is not a known field"):
        await read_parts(CaptionRequest, part("image", PNG), part("texts", b"a"))
    with pytest.raises(InvalidRequestError, match="image: is sent 2 times; send it once"):
        await read_parts(RetrieveRequest, part("image", PNG), part("image", PNG))


@pytest.mark.parametrize("value", [b"5", b"[]", b'["a"]', b'"a"'])
async def test_candidates_that_are_no_object_are_refused_beside_parts_too(value: bytes) -> None:
    for parts in ((), (part("images", PNG),)):
        with pytest.raises(InvalidRequestError, match="candidates: "):
            await read_parts(RetrieveRequest, part("text", b"a"), part("candidates", value), *parts)


@pytest.mark.parametrize("headers", [(), (AS_JSON,)])
async def test_null_in_a_part_of_json_is_absent(headers: tuple[str, ...]) -> None:
    names = set(VqaRequest.model_fields) - {"image", "question"}
    nulls = [part(name, b"null", AS_JSON, disposition=BLOB) for name in names]
    asked = (part("image", PNG), part("question", b"a"))
    body = await read_parts(VqaRequest, *asked, *nulls, part("question", b"null", AS_JSON))
    assert body == VqaRequest(image=Upload(PNG), question=["a"])
    assert body.model_fields_set == {"image", "question"}
    body = await read_parts(VqaRequest, *asked, part("history", b"null", *headers))
    assert body.history == []
    candidates = part("candidates", b"null", *headers)
    ranked = await read_parts(RetrieveRequest, part("text", b"a"), candidates, part("images", PNG))
    assert ranked.candidate_images == [Upload(PNG)]
    with pytest.raises(InvalidRequestError, match="candidates: is required; add it"):
        await read_parts(RetrieveRequest, part("text", b"a"), candidates)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("num_beams", "'null' is not a whole number; send digits, or leave the field out"),
        ("length_penalty", "'null' is not a number; send digits, or leave the field out"),
        ("seed", "'null' is not a whole number; send digits, or leave the field out"),
        ("logprobs", "'null' is not a truth value; send true or false, or leave the field out"),
    ],
)
async def test_the_text_null_is_no_number(name: str, error: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name}: {error}"):
        await read_parts(CaptionRequest, part("image", PNG), part(name, b"null"))


async def test_the_text_null_is_a_text() -> None:
    body = await read_parts(VqaRequest, part("image", PNG), part("question", b"null"), part("seed", b""))
    assert (body.question, body.seed) == (["null"], None)
    assert (await read_parts(CaptionRequest, part("image", PNG), part("prompt", b"null"))).prompt == "null"


@pytest.mark.parametrize(
    "preamble", [b"a preamble\r\n", b"\r\n\r\n", b"of two lines\r\n--Y\r\n", b"inside --X of a line\r\n"]
)
async def test_a_form_may_have_a_preamble(preamble: bytes) -> None:
    body = await read_form(preamble + part("image", PNG) + text_part(b"prompt", b"a") + FORM_END)
    assert (body.image, body.prompt) == (Upload(PNG), "a")


async def test_no_part_is_taken_for_a_preamble() -> None:
    for start in (b"\n", b"\r\n\n"):
        body = await read_form(start + text_part(b"prompt", b"a") + part("image", PNG) + FORM_END)
        assert (body.image, body.prompt) == (Upload(PNG), "a")
    with pytest.raises(UnreadableBodyError, match="the form"):
        await read_form(b"hello\n" + text_part(b"prompt", b"a") + part("image", PNG) + FORM_END)


async def test_a_preamble_without_a_form_is_unreadable() -> None:
    for content in (b"a preamble", b"a preamble\r\n", b"a preamble" + FORM_END[:-2]):
        with pytest.raises(UnreadableBodyError, match="the form"):
            await read_form(content)


async def test_the_json_of_all_parts_together_is_bounded() -> None:
    values = json.dumps(["a"] * (MAX_VALUES // 2)).encode()
    blobs = [part(name, values, AS_JSON, disposition=BLOB) for name in ("history", "question", "image")]
    with pytest.raises(TooManyItemsError, match=f"more than {MAX_VALUES} values"):
        await read(VqaRequest, b"".join(blobs) + FORM_END, FORM, FEW)


@pytest.mark.parametrize(
    "content",
    [
        b"\r\n" + part("image", PNG) + FORM_END,
        part("image", PNG) + FORM_END + b"\r\n",
        part("image", PNG) + FORM_END + b"an epilogue",
        part("image", PNG) + b"--X--",
    ],
)
async def test_a_form_may_have_line_breaks_around_it(content: bytes) -> None:
    assert (await read(CaptionRequest, content, FORM)).image == Upload(PNG)


@pytest.mark.parametrize(
    "kind",
    [
        "MULTIPART/FORM-DATA; BOUNDARY=X",
        'multipart/form-data;boundary="X"',
        "multipart/form-data; a=b; boundary=X",
    ],
)
async def test_the_content_type_of_a_form_may_be_written_in_other_ways(kind: str) -> None:
    content = part("image", PNG) + FORM_END
    assert (await read(CaptionRequest, content, {"content-type": kind})).image == Upload(PNG)


@pytest.mark.parametrize("name", ["Content-Disposition: form-data", "Content-Type: image/png"])
async def test_a_header_of_very_many_parameters_is_refused(name: str) -> None:
    """The parser's time grows with the square of their number."""
    for num_parameters, is_read in ((30, True), (33, False), (800, False)):
        header = (name + "; a=b" * num_parameters).encode()
        if name.startswith("Content-Type"):
            content = IMAGE_PART.replace(b"\r\n\r\n", b"\r\n" + header + b"\r\n\r\n") + FORM_END
        else:
            content = IMAGE_PART.replace(b"Content-Disposition: form-data", header) + FORM_END
        if is_read:
            assert (await read_form(content)).image == Upload(b"data")
        else:
            with pytest.raises(UnreadableBodyError, match="semicolons, the limit is 32"):
                await read_form(content)
