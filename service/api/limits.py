"""What several requests must keep to. The errors name the field, the value, the limit and the cure."""

from collections.abc import Sequence

from service.errors import InvalidRequestError, TooManyItemsError


def check_one_of(prefix: str = "", **fields: object) -> None:
    """Raises InvalidRequestError unless exactly one of the named values is given. prefix: of their path."""
    given = [name for name, value in fields.items() if value is not None]
    names = " or ".join(prefix + name for name in fields)
    if len(given) != 1:
        raise InvalidRequestError.of(
            prefix + next(iter(fields)), f"{len(given)} of {names} are given; send exactly one of them"
        )


def check_count(field: str, items: Sequence[object], limit: int, setting: str) -> None:
    """Raises InvalidRequestError for none, TooManyItemsError for more than the setting allows."""
    if not items:
        raise InvalidRequestError.of(field, "is an empty list; send at least one")
    if len(items) > limit:
        raise TooManyItemsError(
            f"{field} has {len(items)} items, the limit is {limit}; send fewer at once, or raise {setting}"
        )


def check_text(field: str, text: str, max_chars: int) -> None:
    """Raises InvalidRequestError where a text says nothing, or too much."""
    if not text.strip():
        raise InvalidRequestError.of(field, "is empty; send a text")
    check_length(field, text, max_chars)


def check_length(field: str, text: str, max_chars: int) -> None:
    """Raises InvalidRequestError where a text is too long."""
    if len(text) > max_chars:
        raise InvalidRequestError.of(
            field, f"has {len(text)} characters, the limit is {max_chars}; shorten it"
        )
