"""Parses multipart/form-data into one of the `schemas`. Errors of validation are explained in `errors`."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pydantic import ValidationError
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from service.api.body.errors import explain
from service.api.body.json_text import TextLimits, parse_objects
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

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

B = TypeVar("B", bound=Body)


@dataclass(slots=True)
class _Part:
    """One part of a form. headers: by their names in lower case. encoding: of its text."""

    encoding: str
    headers: dict[bytes, bytes] = field(default_factory=dict)
    name: str = ""
    is_file: bool = False
    data: bytes | bytearray = field(default_factory=bytearray)

    def read_headers(self) -> None:
        """Read name, kind and encoding. Raises UnreadableBodyError."""
        _, disposition = parse_options_header(self.headers.get(b"content-disposition"))
        media_type, parameters = parse_options_header(self.headers.get(b"content-type"))
        if b"name" not in disposition:
            raise UnreadableBodyError("a part of the form has no name; send one in its Content-Disposition")
        self.name = _decode(disposition[b"name"], self.encoding, "the name of a part")
        self.is_file = b"filename" in disposition or not (media_type or b"text/").startswith(b"text/")
        self.encoding = _encoding(parameters, self.encoding)

    def value(self, limits: TextLimits) -> str | bytes:
        """Return the bytes of an image file, else text: browsers send values as a file part too."""
        data, self.data = self.data, b""  # held once
        if self.is_file and self.name in _IMAGE_FIELDS:
            return bytes(data)
        limits.check_wide(data)
        return _decode(data, self.encoding, self.name)


def parse_form(content_type: str, body: bytearray, schema: type[B], limits: TextLimits) -> B:
    parts = _Form(content_type).parse(body, limits.max_values)
    fields = _to_fields(parts, schema, limits)
    try:
        return schema.model_validate(fields)
    except ValidationError as exc:
        error = explain(exc, schema)
    fields.clear()
    raise error


def _to_fields(parts: dict[str, list[_Part]], schema: type[Body], limits: TextLimits) -> dict[str, Any]:
    if len(parts.get("image", ())) > 1 and "images" in schema.lists:
        parts["images"] += parts.pop("image")
    fields: dict[str, Any] = {}
    for name, same in parts.items():
        if name not in schema.model_fields:
            fields[name] = None  # validation will name it
        elif len(same) > 1 and name not in schema.lists:
            raise InvalidRequestError.of(name, f"is sent {len(same)} times; send it once")
        else:
            values: list[Any] = (
                parse_objects(name, [part.data for part in same], limits)
                if name in schema.objects
                else [part.value(limits) for part in same]
            )
            fields[name] = _flatten(values) if name in schema.lists else values[0]
    return fields


def _flatten(values: list[Any]) -> list[Any]:
    """Return the values of a repeated part, in which a list of JSON may stand for several."""
    return [each for value in values for each in (value if isinstance(value, list) else [value])]


class _Form:
    """Parses multipart/form-data, from memory, so that nothing is written to disk."""

    def __init__(self, content_type: str) -> None:
        _, parameters = parse_options_header(content_type)
        if not parameters.get(b"boundary"):
            raise UnreadableBodyError("the form has no boundary; name it in the Content-Type")
        self._boundary = parameters[b"boundary"]
        self._encoding = _encoding(parameters, "utf-8")
        self._parts: dict[str, list[_Part]] = defaultdict(list)
        self._part = _Part(self._encoding)
        self._header_name = self._header_value = b""
        self._is_closed = False

    def parse(self, body: bytearray, max_parts: int) -> dict[str, list[_Part]]:
        """Return the parts of each name.

        Raises UnreadableBodyError where the form is cut off or malformed, TooManyItemsError for too many
        parts.
        """
        if body.count(b"\r\n--" + self._boundary) > max_parts:  # each costs the parser a microsecond
            raise TooManyItemsError(f"the form has more than {max_parts} parts; send fewer at once")
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
        if part.name == "_charset_":  # RFC 7578, 4.6: the encoding of the parts that follow
            self._encoding = _encoding({b"charset": bytes(part.data)}, self._encoding)
        else:
            self._parts[part.name].append(part)
        self._part = _Part(self._encoding)

    def _close(self) -> None:
        self._is_closed = True


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
        return data.decode(encoding)
    except UnicodeDecodeError as exc:
        raise UnreadableBodyError(f"{echo(subject)} is not {encoding}; send the form in utf-8") from exc
