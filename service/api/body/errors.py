"""Errors of validation, in words: each names the field, its value and the cure."""

import difflib
from typing import Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from service.api.retrieve_schema import Candidates
from service.api.schemas import Body, Turn
from service.errors import FieldError, InvalidRequestError, UnreadableBodyError, echo, echo_value

_MAX_FIELD_ERRORS: Final = 10

_NESTED: Final[dict[str, type[Body]]] = {"candidates": Candidates, "history": Turn}
_EXPECTED: Final = {
    "int_type": "a whole number; send one without quotes",
    "int_parsing": "a whole number; send digits, or leave the field out",
    "float_type": "a number; send one without quotes",
    "float_parsing": "a number; send digits, or leave the field out",
    "finite_number": "a finite number; send another",
    "bool_type": "a truth value; send true or false",
    "bool_parsing": "a truth value; send true or false, or leave the field out",
    "string_type": "a string; put it in quotes",
    "list_type": "a list; put it in [ and ]",
    "model_type": "an object; put its fields in {{ and }}",
    "enum": "{expected}; choose one of them",
    "greater_than_equal": "within the limit; send at least {ge}",
}


def explain(exc: ValidationError, schema: type[Body]) -> InvalidRequestError | UnreadableBodyError:
    """Return the error for the caller: all fields at fault, up to ten; of a list, its first wrong item."""
    details = exc.errors(include_url=False)
    if details[0]["type"] == "json_invalid":
        return UnreadableBodyError(
            f"the body is not JSON: {details[0]['msg']}; check its syntax, and that it is in utf-8"
        )
    if not details[0]["loc"]:
        return UnreadableBodyError("the body is not a JSON object; put the fields between { and }")
    fields = tuple(_field_error(detail, schema) for detail in details[:_MAX_FIELD_ERRORS])
    return InvalidRequestError(
        "; ".join(f"{field.field}: {field.message}" for field in fields), fields=fields
    )


def _field_error(detail: ErrorDetails, schema: type[Body]) -> FieldError:
    path = ".".join(echo(str(step)) for step in detail["loc"])
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return FieldError(path, _unknown_field(detail["loc"], schema))
    if kind == "missing":
        return FieldError(path, "is required; add it")
    if kind == "value_error":
        return FieldError(path, str(context["error"]))
    expected = _EXPECTED.get(kind, detail["msg"]).format(**context)
    return FieldError(path, f"{echo_value(detail['input'])} is not {expected}")


def _unknown_field(path: tuple[int | str, ...], schema: type[Body]) -> str:
    known = _NESTED[str(path[0])].model_fields if len(path) > 1 else schema.model_fields
    nearest = difflib.get_close_matches(echo(str(path[-1])), known, n=1)
    cure = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
    return f"is not a known field; {cure}"
