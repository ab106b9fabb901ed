"""Strict JSON files: an unknown, missing or wrong key is an error that names file, key and cure."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from model.errors import CheckpointError, InvalidPromptError

T = TypeVar("T")


def read_json(path: Path) -> dict[str, object]:
    """Return the object in a JSON file. Raises CheckpointError where it is absent or not JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path} ({error.strerror}); give a whole checkpoint directory"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); save the checkpoint again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; save the checkpoint again")
    return content


def build_record(record: type[T], fields: object, *, where: str) -> T:
    """Build a dataclass, and those inside it, from a JSON object. Raises CheckpointError.

    where: file and key of the object, for error messages.
    """
    _refuse_unknown_keys(record, fields, where)
    try:
        return TypeAdapter(record).validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = "".join(f": {key!r}" for key in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"{where}{location}: {message}; it is {first['input']!r}") from error
    except InvalidPromptError as error:
        raise CheckpointError(f"{where} is not valid: {error}") from error


def _refuse_unknown_keys(record: type[object], fields: object, where: str) -> None:
    if not isinstance(fields, Mapping):
        raise CheckpointError(f"{where} must be a JSON object, it is {fields!r}")
    types = get_type_hints(record)
    if unknown := sorted(fields.keys() - types.keys()):
        raise CheckpointError(
            f"{where} has the unknown key {unknown[0]!r}; the known ones are {sorted(types)}"
        )
    for key, value in fields.items():
        for inner in (types[key], *get_args(types[key])):
            if dataclasses.is_dataclass(inner) and value is not None:
                _refuse_unknown_keys(inner, value, f"{where}: {key!r}")  # type: ignore[arg-type]
