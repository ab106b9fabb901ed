"""JSON within limits, checked before it is parsed: each value costs many times its bytes.

All passes over the text are calls into C, which scan 64 MB within 0.2 s each.
"""

import json
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import pydantic_core
from pydantic import ValidationError

from service.api.body.errors import explain
from service.api.schemas import Body
from service.errors import (
    MAX_ECHOED,
    InvalidRequestError,
    TooManyItemsError,
    UnreadableBodyError,
    echo_value,
)

_STRUCTURE: Final = (b",", b"[", b"{")  # each value but the first follows one
BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"  # which Windows puts before UTF-8
_MAX_UNCHECKED_BYTES: Final = 64 * 1024
_BYTES_PER_CHAR: Final = 12  # of JSON, for a character beyond the basic plane: \ud83d\ude00

B = TypeVar("B", bound=Body)


@dataclass(frozen=True, slots=True)
class TextLimits:
    """max_values: in one request. max_chars: of a text with characters beyond ASCII; images have none."""

    max_values: int
    max_chars: int

    def check_wide(self, text: bytes | bytearray) -> None:
        """Raise InvalidRequestError for a long text that takes up to four bytes a character."""
        if len(text) > self.max_chars * _BYTES_PER_CHAR and _is_wide(text):
            raise InvalidRequestError(
                f"a text in the body has {len(text)} bytes, the limit is {self.max_chars} characters; "
                "shorten it"
            )


@dataclass(slots=True)
class JsonReader:
    """Checks and parses the JSON texts of one request within limits that they share.

    num_values: of the texts so far.
    """

    limits: TextLimits
    num_values: int = 0

    def check(self, data: bytes | bytearray) -> None:
        """Raise TooManyItemsError for too many values, InvalidRequestError for a long text beyond ASCII.

        Of data that is no JSON, at least the readable beginning is checked.
        """
        num_left = self.limits.max_values - self.num_values
        num_values = _count(data, num_left)
        is_wide = len(data) > _MAX_UNCHECKED_BYTES and _is_wide(data)
        if num_values > num_left or is_wide:  # perhaps they are inside strings
            num_values = self._check_pieces(data, num_left)
        self.num_values += num_values
        if num_values > num_left:
            raise self._too_many()

    def parse(self, name: str, text: bytearray) -> Any:
        """Parse the JSON of a part of a form.

        Raises as `check`, InvalidRequestError for what is no JSON, or UnreadableBodyError for its encoding.
        """
        _convert_to_utf8(text)
        self.check(text)
        try:
            return pydantic_core.from_json(text)
        except ValueError as exc:
            value = echo_value(text[: 4 * MAX_ECHOED].decode(errors="replace"))
            raise InvalidRequestError.of(
                name,
                f"{value} is not JSON ({exc}); send an object in {{ and }}, and repeat the field for a list",
            ) from None

    def _check_pieces(self, data: bytes | bytearray, num_left: int) -> int:
        unescaped = data.replace(b"\\\\", b"").replace(b'\\"', b"")
        # Each string is a value or a key. So the split makes no more pieces than that.
        if unescaped.count(b'"') > 4 * num_left + 4:
            raise self._too_many()
        pieces = unescaped.split(b'"')
        for text in pieces[1::2]:
            self.limits.check_wide(text)
        return sum(_count(outside, num_left) for outside in pieces[::2])

    def _too_many(self) -> TooManyItemsError:
        return TooManyItemsError(
            f"the body has more than {self.limits.max_values} values, the most any request needs; "
            "send fewer at once"
        )


def parse_json(body: bytearray, schema: type[B], limits: TextLimits) -> B:
    """Parse JSON. Raises UnreadableBodyError, TooManyItemsError or InvalidRequestError."""
    _convert_to_utf8(body)
    JsonReader(limits).check(body)
    try:
        return schema.model_validate_json(body, strict=True)
    except ValidationError as exc:
        error = explain(exc, schema)
    raise error  # not in the handler: its context would hold the values


def _convert_to_utf8(text: bytearray) -> None:
    """Convert JSON in another encoding of Unicode, or with a byte order mark. Raises UnreadableBodyError."""
    encoding = json.detect_encoding(text)
    if encoding == "utf-8":
        return
    if encoding == "utf-8-sig":
        del text[: len(BYTE_ORDER_MARK)]
        return
    try:
        text[:] = text.decode(encoding).encode()
    except UnicodeDecodeError:
        error = UnreadableBodyError(f"the body is neither {encoding} nor utf-8; send it in utf-8")
    else:
        return
    raise error  # not in the handler: its context would hold the text


def _is_wide(text: bytes | bytearray) -> bool:
    """Return whether a JSON text has characters beyond ASCII, but for escapes up to \\u00ff.

    Some clients escape the + of base64 as \\u002B.
    """
    return not text.isascii() or text.count(b"\\u") > text.count(b"\\u00")


def _count(data: bytes | bytearray, limit: int) -> int:
    """Return the number of structural characters, or a number above the limit."""
    found = 0
    for character in _STRUCTURE:
        at = data.find(character)
        while at >= 0 and found <= limit:
            found += 1
            at = data.find(character, at + 1)
    return found
