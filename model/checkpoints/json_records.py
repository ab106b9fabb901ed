"""Strict JSON files: an unknown, missing or wrong key is an error that names file, key and cure."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from model.errors import CheckpointError, InvalidPromptError

T = TypeVar("T")
_MAX_BYTES = 64 << 20
_MAX_DEPTH = 64


def read_json(path: Path) -> dict[str, object]:
    """Return the object in a JSON file.

    Raises CheckpointError where it is absent, not JSON, longer than 64 MiB, or deeper than 64 levels.
    """
    try:
        if (num_bytes := path.stat().st_size) > _MAX_BYTES:
            raise CheckpointError(
                f"{path} has {num_bytes:,} bytes, the limit is {_MAX_BYTES:,}; give the one that was saved "
                "with the checkpoint"
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path} ({error.strerror}); give a whole checkpoint directory"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); save the checkpoint again") from error
    if _depth(content) > _MAX_DEPTH:
        raise CheckpointError(
            f"{path} has values inside one another at more than {_MAX_DEPTH} levels; give the one that was "
            "saved with the checkpoint"
        )
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; save the checkpoint again")
    return content


def _depth(value: object) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return depth


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
        raise CheckpointError(f"{where}{location}: {message}; it is {repr(first['input'])[:60]}") from error
    except InvalidPromptError as error:
        raise CheckpointError(f"{where} is not valid: {error}") from error


def _refuse_unknown_keys(record: type[object], fields: object, where: str) -> None:
    if not isinstance(fields, Mapping):
        raise CheckpointError(f"{where} must be a JSON object, it is {repr(fields)[:60]}")
    types = get_type_hints(record)
    if unknown := sorted(fields.keys() - types.keys()):
        raise CheckpointError(
            f"{where} has the unknown key {unknown[0]!r}; the known ones are {sorted(types)}"
        )
    for key, value in fields.items():
        for inner in (types[key], *get_args(types[key])):
            if dataclasses.is_dataclass(inner) and value is not None:
                _refuse_unknown_keys(inner, value, f"{where}: {key!r}")  # type: ignore[arg-type]
