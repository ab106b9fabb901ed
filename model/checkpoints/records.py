"""Reads the JSON files of checkpoints, strictly: an error names the file, the key and the cure."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from model.errors import CheckpointError, InvalidPromptError

T = TypeVar("T")


def read_json(path: Path) -> dict[str, object]:
    """Gives the object in a JSON file. Raises CheckpointError where it is absent or not JSON."""
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
    """Builds a dataclass of the object in a file, found at `where`. Raises CheckpointError."""
    if not isinstance(fields, Mapping):
        raise CheckpointError(f"{where} must be a JSON object, it is {fields!r}")
    known = {known.name: known for known in dataclasses.fields(record)}  # type: ignore[arg-type]
    if unknown := sorted(fields.keys() - known.keys()):
        raise CheckpointError(
            f"{where} has the unknown key {unknown[0]!r}; the known ones are {sorted(known)}"
        )
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    try:
        return record(**values)
    except (TypeError, ValueError, InvalidPromptError) as error:
        raise CheckpointError(f"{where} is not valid: {error}") from error
