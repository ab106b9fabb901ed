"""JSON within a limit: values are counted before they are built, for each costs many times its bytes."""

from typing import Any, Final

import pydantic_core

from service.errors import InvalidRequestError, TooManyItemsError, echo_value

_STRUCTURE: Final = (b",", b"[", b"{")


class ValueLimit:
    """Counts the values of the JSON texts of one request. Each but the first follows one of , [ {."""

    def __init__(self, max_values: int) -> None:
        self._max_values = max_values
        self._num_left = max_values

    def count(self, num_values: int) -> None:
        """Raise TooManyItemsError where there are more values than the limit."""
        self._num_left -= num_values
        if self._num_left < 0:
            raise TooManyItemsError(
                f"the body has more than {self._max_values} values, the most any request needs; "
                "send fewer at once"
            )

    def count_json(self, data: bytes | bytearray) -> None:
        """Count the values of a text. Each call into C scans 64 MB within 0.2 s.

        Raises TooManyItemsError. Of data that is no JSON, at least the readable beginning is counted.
        """
        num_values = _count(data, self._num_left)
        if num_values > self._num_left:  # perhaps inside strings
            num_values = self._count_outside_strings(data)
        self.count(num_values)

    def _count_outside_strings(self, data: bytes | bytearray) -> int:
        unescaped = data.replace(b"\\\\", b"").replace(b'\\"', b"")
        # Each string is a value or a key; the split below makes no more pieces than that.
        if unescaped.count(b'"') > 4 * self._num_left + 4:
            return self._num_left + 1
        return sum(_count(outside, self._num_left) for outside in unescaped.split(b'"')[::2])


def _count(data: bytes | bytearray, limit: int) -> int:
    """Return the number of structural characters, or a number above the limit."""
    found = 0
    for character in _STRUCTURE:
        at = data.find(character)
        while at >= 0 and found <= limit:
            found += 1
            at = data.find(character, at + 1)
    return found


def parse_objects(name: str, texts: list[str], max_values: int) -> list[Any]:
    """Parse the JSON texts of one field of a form, within one limit.

    Raises InvalidRequestError, and TooManyItemsError beyond the limit.
    """
    limit, parsed = ValueLimit(max_values), []
    for text in texts:
        limit.count_json(text.encode())
        try:
            parsed.append(pydantic_core.from_json(text))
        except ValueError as exc:
            raise InvalidRequestError.of(
                name,
                f"{echo_value(text)} is not JSON ({exc}); send an object in {{ and }}, "
                "and repeat the field for a list",
            ) from None
    return parsed
