"""Parses multipart/form-data into one of the `schemas`. Errors of validation are explained in `errors`.

Browsers, curl and the HTTP libraries write forms in different ways; what is clearly meant is read.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pydantic import ValidationError
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from service.api.body.errors import explain
from service.api.body.json_text import BYTE_ORDER_MARK, JsonReader, TextLimits
from service.api.schemas import Body
from service.errors import (
    InvalidRequestError,
    TooManyItemsError,
    UnreadableBodyError,
    echo,
    echo_value,
)

_IMAGE_FIELDS: Final = ("image", "images")
_ENCODINGS: Final = {"utf-8": "utf-8", "utf8": "utf-8", "us-ascii": "utf-8", "iso-8859-1": "latin-1"}
_SUBSCRIPT: Final = re.compile(r"\[([^\[\]]*)\]")
_EXTENDED_FILENAME: Final = re.compile(rb";\s*filename\*", re.IGNORECASE)  # which the parser leaves out
_PRINTABLE: Final = bytes([*b"\t\r\n", *range(32, 127)])
_NUM_SNIFFED: Final = 64
_MAX_PARAMETERS: Final = 32  # of a header: the parser's time grows with the square of their number

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

B = TypeVar("B", bound=Body)


@dataclass(slots=True)
class _Part:
    """One part of a form.

    headers: by their names in lower case. encoding: of its text. name: of its field; sent_name: as it was
    sent. index: in the list of its field, where the name has one.
    """

    encoding: str
    headers: dict[bytes, bytes] = field(default_factory=dict)
    sent_name: str = ""
    name: str = ""
    index: float = math.inf
    has_filename: bool = False
    is_file: bool = False
    is_json: bool = False
    data: bytearray = field(default_factory=bytearray)

    def read_headers(self) -> None:
        """Read name, kind and encoding. Raises UnreadableBodyError."""
        header = self.headers.get(b"content-disposition", b"")
        _, disposition = _parse_header(header)
        media_type, parameters = _parse_header(self.headers.get(b"content-type", b""))
        if b"name" not in disposition:
            raise UnreadableBodyError("a part of the form has no name; send one in its Content-Disposition")
        self.sent_name = _decode(disposition[b"name"], self.encoding, "the name of a part")
        self.name, self.index = _split_name(self.sent_name)
        self.has_filename = bool(disposition.get(b"filename") or _EXTENDED_FILENAME.search(header))
        is_base64 = self.headers.get(b"content-transfer-encoding", b"").strip().lower() == b"base64"
        is_text = (media_type or b"text/").startswith(b"text/")
        self.is_file = not is_base64 and (self.has_filename or not is_text)
        self.is_json = media_type == b"application/json" or media_type.endswith(b"+json")
        self.encoding = _encoding(parameters, self.encoding)

    @property
    def is_absent(self) -> bool:
        """Whether it is what an HTML form sends for a field that was left empty."""
        return not self.data and not self.has_filename

    @property
    def is_binary(self) -> bool:
        """Whether it begins as image files do, and neither base64 nor a JSON object does."""
        head = self.data[:_NUM_SNIFFED].removeprefix(BYTE_ORDER_MARK)
        return not head.lstrip().startswith(b"{") and bool(head.translate(None, _PRINTABLE))

    def image(self, json: JsonReader) -> Any:
        """Return the bytes of an image file, or the text that stands for an image."""
        if self.is_json and not self.is_binary:
            return self.value(json)
        is_file = self.is_file or self.is_binary
        data, self.data = self.data, bytearray()  # held once
        return bytes(data) if is_file else data.removeprefix(BYTE_ORDER_MARK).decode("latin-1")

    def value(self, json: JsonReader) -> Any:
        """Return its text, or what its JSON stands for: browsers send values as file parts too."""
        json.limits.check_wide(self.data)
        text = _decode(self.data, self.encoding, self.sent_name)
        if not self.is_json:
            return text
        try:
            value = json.parse(self.sent_name, self.data)
        except InvalidRequestError:
            return text
        return text if isinstance(value, int | float) else value  # the field may be a text


def parse_form(content_type: str, body: bytearray, schema: type[B], limits: TextLimits) -> B:
    """Parse a form. Raises UnreadableBodyError, TooManyItemsError or InvalidRequestError."""
    parts = _Form(content_type).parse(body, limits.max_values)
    fields = _to_fields(parts, schema, JsonReader(limits))
    try:
        return schema.model_validate(fields)
    except ValidationError as exc:
        error = explain(exc, schema)
    fields.clear()
    raise error


def _to_fields(parts: Iterable[_Part], schema: type[Body], json: JsonReader) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    lists: dict[tuple[str, str], list[Any]] = defaultdict(list)  # by field, and its member where it is nested
    for name, same in _by_field(parts, schema, fields).items():
        field_name, member = schema.nested.get(name, (name, ""))
        if len(same) > 1 and not member and name not in schema.lists:
            raise InvalidRequestError.of(name, f"is sent {len(same)} times; send it once")
        values = [value for value in _values(name, member, same, schema, json) if value is not None]
        if values and (member or name in schema.lists):
            lists[field_name, member] += _flatten(values)
        elif values:
            (fields[name],) = values
    for (field_name, member), values in lists.items():
        if not member:
            fields[field_name] = values
        elif isinstance(members := fields.setdefault(field_name, {}), dict):
            sent = members.get(member)
            members[member] = [*sent, *values] if isinstance(sent, list) else values
    return fields


def _by_field(parts: Iterable[_Part], schema: type[Body], fields: dict[str, Any]) -> dict[str, list[_Part]]:
    """Return the parts of each field in their order; note unknown ones in `fields`, for validation."""
    found: dict[str, list[_Part]] = defaultdict(list)
    for part in parts:
        name = part.name
        if name in schema.objects and f"{name}.images" in schema.nested and part.is_binary:
            name = f"{name}.images"
        if name not in schema.model_fields and name not in schema.nested:
            fields[part.sent_name] = None
        elif not part.is_absent:
            found[name].append(part)
    if len(found.get("image", ())) > 1 and "images" in schema.lists:
        found["images"] += found.pop("image")
    return {name: sorted(same, key=lambda part: part.index) for name, same in found.items()}


def _values(name: str, member: str, parts: list[_Part], schema: type[Body], json: JsonReader) -> list[Any]:
    if name in schema.objects:
        return [json.parse(name, part.data) for part in parts]
    if (member or name) in _IMAGE_FIELDS:
        return [part.image(json) for part in parts]
    return [part.value(json) for part in parts]


def _flatten(values: list[Any]) -> list[Any]:
    """Return the values of a repeated part, in which a list of JSON may stand for several."""
    return [each for value in values for each in (value if isinstance(value, list) else [value])]


def _split_name(sent: str) -> tuple[str, float]:
    """Return the field that a name means, and its index: images[] is images, a[b][2] is a.b at 2."""
    name, bracket, rest = sent.partition("[")
    keys = _SUBSCRIPT.findall(bracket + rest)
    if not name or "".join(f"[{key}]" for key in keys) != bracket + rest:
        return sent, math.inf
    index = math.inf
    for key in keys:
        if key.isascii() and key.isdecimal() and len(key) < 7:
            index = int(key)
        elif key:
            name = f"{name}.{key}"
    return name, index


class _Form:
    """Parses multipart/form-data, from memory, so that nothing is written to disk."""

    def __init__(self, content_type: str) -> None:
        _, parameters = parse_options_header(content_type)
        if not parameters.get(b"boundary"):
            raise UnreadableBodyError("the form has no boundary; name it in the Content-Type")
        self._boundary = parameters[b"boundary"]
        self._encoding = _encoding(parameters, "utf-8")
        self._parts: list[_Part] = []
        self._part = _Part(self._encoding)
        self._header_name = self._header_value = b""
        self._is_closed = False

    def parse(self, body: bytearray, max_parts: int) -> list[_Part]:
        """Return the parts in their order.

        Raises UnreadableBodyError where the form is cut off or malformed, TooManyItemsError for too many
        parts.
        """
        if body.count(b"\r\n--" + self._boundary) > max_parts:  # each costs the parser a microsecond
            raise TooManyItemsError(f"the form has more than {max_parts} parts; send fewer at once")
        first = re.search(rb"(?:\A|(\r\n)|\n)--" + re.escape(self._boundary), body)
        if first is not None and first[1]:
            del body[: first.end(1)]  # a preamble, which counts for nothing (RFC 2046, 5.1.1)
        callbacks: MultipartCallbacks = {
            "on_header_field": self._read_header_name,
            "on_header_value": self._read_header_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._read_data,
            "on_part_end": self._end_part,
            "on_end": self._close,
        }
        try:
            parser = MultipartParser(self._boundary, callbacks)
            parser.write(body)  # type: ignore[arg-type] # it slices and searches, which a bytearray can
            parser.finalize()
        except FormParserError as exc:
            raise UnreadableBodyError(f"the form cannot be read: {exc}; check how it is encoded") from exc
        if body and not self._is_closed:
            raise UnreadableBodyError("the form ends before its closing boundary; send it whole")
        return self._parts

    def _read_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _read_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        self._part.headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _end_headers(self) -> None:
        self._part.read_headers()

    def _read_data(self, data: bytes, start: int, end: int) -> None:
        self._part.data += memoryview(data)[start:end]

    def _end_part(self) -> None:
        part = self._part
        if part.sent_name == "_charset_":  # RFC 7578, 4.6: the encoding of the parts that follow
            self._encoding = _encoding({b"charset": bytes(part.data)}, self._encoding)
        else:
            self._parts.append(part)
        self._part = _Part(self._encoding)

    def _close(self) -> None:
        self._is_closed = True


def _parse_header(header: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """Return the value of a part's header and its parameters. Raises UnreadableBodyError for too many."""
    if (count := header.count(b";")) > _MAX_PARAMETERS:
        raise UnreadableBodyError(
            f"a header of the form has {count} semicolons, the limit is {_MAX_PARAMETERS}; "
            "send fewer parameters"
        )
    return parse_options_header(header)


def _encoding(parameters: dict[bytes, bytes], default: str) -> str:
    """Return Python's name of the encoding in these parameters. Raises UnreadableBodyError for others."""
    charset = parameters.get(b"charset")
    if charset is None:
        return default
    name = charset.decode("latin-1").strip().lower()
    if name not in _ENCODINGS:
        raise UnreadableBodyError(f"the charset is {echo_value(name)}; send the form in utf-8")
    return _ENCODINGS[name]


def _decode(data: bytes | bytearray, encoding: str, subject: str) -> str:
    try:
        return data.decode(encoding).removeprefix("\ufeff")  # which editors put before a text
    except UnicodeDecodeError as exc:
        raise UnreadableBodyError(f"{echo(subject)} is not {encoding}; send the form in utf-8") from exc
