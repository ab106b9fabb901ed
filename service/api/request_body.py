"""Reads the body of a request, JSON or a form, into one of the `schemas`, or explains what is invalid."""

import difflib
from collections import defaultdict
from typing import Any, Final, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.types import Message, Receive

from service.api.schemas import Body, Candidates, Turn
from service.errors import (
    BodyTooLargeError,
    FieldError,
    InvalidRequestError,
    UnreadableBodyError,
    UnsupportedContentTypeError,
)

_MAX_PARTS: Final = 4096
_MAX_ECHOED: Final = 60  # characters of a caller's value that an error repeats
_MAX_FIELD_ERRORS: Final = 10

_NESTED: Final[dict[str, type[Body]]] = {"candidates": Candidates, "history": Turn}
_EXPECTED: Final = {
    "int_type": "a whole number; send one without quotes",
    "int_parsing": "a whole number; send digits",
    "float_type": "a number; send one without quotes",
    "float_parsing": "a number; send digits",
    "finite_number": "a finite number; send another",
    "bool_type": "a truth value; send true or false",
    "bool_parsing": "a truth value; send true or false",
    "string_type": "a string; put it in quotes",
    "list_type": "a list; put it in [ and ]",
    "model_type": "an object; put its fields in {{ and }}",
    "enum": "{expected}; choose one of them",
    "greater_than_equal": "within the limit; send at least {ge}",
}

B = TypeVar("B", bound=Body)


async def read_body(request: Request, schema: type[B], max_bytes: int) -> B:
    """Parse the body and check its types.

    Raises UnreadableBodyError (400), BodyTooLargeError (413), UnsupportedContentTypeError (415) or
    InvalidRequestError (422).
    """
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(int(declared), max_bytes)
    bounded = Request(request.scope, _bounded(request.receive, max_bytes))
    try:
        if content_type == "multipart/form-data":
            return schema.model_validate(await _read_form(bounded, schema))
        if content_type == "application/json" or content_type.endswith("+json"):
            return schema.model_validate_json(await bounded.body(), strict=True)
    except ValidationError as exc:
        raise _explain(exc, schema) from None
    raise UnsupportedContentTypeError(
        f"the body is {content_type!r}; send application/json or multipart/form-data"
    )


def _bounded(receive: Receive, max_bytes: int) -> Receive:
    num_bytes = 0

    async def bounded() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > max_bytes:
            raise _too_large(num_bytes, max_bytes)
        return message

    return bounded


def _too_large(num_bytes: int, max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(
        f"the body has {num_bytes} bytes or more, the limit is {max_bytes}; send fewer or smaller images"
    )


async def _read_form(request: Request, schema: type[Body]) -> dict[str, Any]:
    values: dict[str, list[str | bytes]] = defaultdict(list)
    async with request.form(max_files=_MAX_PARTS, max_fields=_MAX_PARTS, max_part_size=2**31) as form:
        for name, part in form.multi_items():
            values[name].append(await part.read() if isinstance(part, UploadFile) else part)
    if len(values["image"]) > 1 and "images" in schema.lists:
        values["images"] += values.pop("image")
    fields: dict[str, Any] = {}
    for name, parts in values.items():
        if name in schema.lists:
            fields[name] = parts
        elif len(parts) > 1:
            raise InvalidRequestError.of(name, f"is sent {len(parts)} times; send it once")
        elif parts:
            fields[name] = parts[0]
    return fields


def _explain(exc: ValidationError, schema: type[Body]) -> InvalidRequestError | UnreadableBodyError:
    details = exc.errors(include_url=False)
    if details[0]["type"] == "json_invalid":
        return UnreadableBodyError(f"the body is not JSON: {details[0]['msg']}; check its syntax")
    if not details[0]["loc"]:
        return UnreadableBodyError("the body is not a JSON object; put the fields between { and }")
    fields = tuple(_field_error(detail, schema) for detail in details[:_MAX_FIELD_ERRORS])
    return InvalidRequestError(
        "; ".join(f"{field.field}: {field.message}" for field in fields), fields=fields
    )


def _field_error(detail: ErrorDetails, schema: type[Body]) -> FieldError:
    path = ".".join(str(step) for step in detail["loc"])
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return FieldError(path, _unknown_field(detail["loc"], schema))
    if kind == "missing":
        return FieldError(path, "is required; add it")
    if kind == "value_error":
        return FieldError(path, str(context["error"]))
    expected = _EXPECTED.get(kind, detail["msg"]).format(**context)
    return FieldError(path, f"{_echo(detail['input'])} is not {expected}")


def _unknown_field(path: tuple[int | str, ...], schema: type[Body]) -> str:
    known = _NESTED[str(path[0])].model_fields if len(path) > 1 else schema.model_fields
    nearest = difflib.get_close_matches(str(path[-1]), known, n=1)
    cure = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
    return f"is not a known field; {cure}"


def _echo(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_ECHOED else f"{text[:_MAX_ECHOED]}…"
