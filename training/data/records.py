"""Images with their texts: records of a JSON Lines file, or of annotations in COCO's format.

Only the positions of the lines are held in memory, 8 bytes a record; COCO's file is read whole.
"""

import json
from array import array
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

MAX_LINE_BYTES: Final = 2**20
_TEXTS: Final = ("caption", "captions")
_KEYS: Final = frozenset({"image", "image_id", "question", "answers", *_TEXTS})


class DataError(Exception):
    """Data that cannot be trained on; the message names file, place, value and cure."""


@dataclass(frozen=True, slots=True)
class Record:
    """An image with its texts. image: its path from the folder of the images. image_id: its name in reports.

    unread_keys: those of its object that mean nothing here.
    """

    image: str
    captions: tuple[str, ...]
    image_id: str
    question: str | None = None
    answers: tuple[str, ...] = ()
    unread_keys: tuple[str, ...] = ()


class Records(Protocol):
    """Records in the order of their file. An item raises DataError where it is not one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def open_records(path: Path) -> Records:
    """Open a file of records: COCO's format where it ends in .json, else one JSON object a line.

    Raises DataError where it cannot be read, is not of its format, or is empty.
    """
    try:
        records: Records = CocoRecords(path) if path.suffix == ".json" else JsonLines(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; correct 'records'") from error
    if len(records) == 0:
        raise DataError(f"{path} holds no record; give a file with at least one")
    return records


class JsonLines:
    """A file with an object `{image, caption or captions, image_id?, question?, answers?}` on each line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts = array("q")
        self._numbers = array("q")  # of the lines, from 1
        position = number = 0
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{path}, line {number}: it has more than {MAX_LINE_BYTES:,} bytes; write one object "
                        "a line, with a path instead of the image itself"
                    )
                if line.strip():
                    self._starts.append(position)
                    self._numbers.append(number)
                position += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Record:
        where = f"{self._path}, line {self._numbers[index]}"
        with self._path.open("rb") as file:
            file.seek(self._starts[index])
            line = file.readline(MAX_LINE_BYTES)
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: it is not JSON ({error}); write one object a line") from error
        if not isinstance(fields, dict):
            raise DataError(f'{where}: it is {_echo(fields)}, no object; write {{"image": …, "caption": …}}')
        return _parse(fields, where)


class CocoRecords:
    """Captions in COCO's format: `images` with `id` and `file_name`, `annotations` with `caption`."""

    def __init__(self, path: Path) -> None:
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path} is not JSON ({error}); a file of one object a line must end in .jsonl"
            ) from error
        captions: dict[Any, list[str]] = defaultdict(list)
        try:
            for annotation in content["annotations"]:
                captions[annotation["image_id"]].append(annotation["caption"])
            self._images = [(each["id"], each["file_name"]) for each in content["images"]]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path} is not in COCO's format of captions ({type(error).__name__}: {error}); it needs "
                "'images' with 'id' and 'file_name', and 'annotations' with 'image_id' and 'caption'"
            ) from error
        self._path = path
        self._captions = dict(captions)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        image_id, file_name = self._images[index]
        fields = {"image": file_name, "image_id": image_id, "captions": self._captions.get(image_id, [])}
        return _parse(fields, f"{self._path}, image {image_id}")


def _parse(fields: Mapping[str, Any], where: str) -> Record:
    image = fields.get("image")
    if not isinstance(image, str) or not image:
        raise DataError(f"{where}: 'image' is {_echo(image)}; write the path of an image")
    given = [name for name in _TEXTS if fields.get(name) is not None]
    if len(given) != 1:
        raise DataError(f"{where}: it has {len(given)} of 'caption' and 'captions'; write one of them")
    texts = fields[given[0]]
    captions = _texts([texts] if given[0] == "caption" else texts, given[0], where)
    if not captions:
        raise DataError(f"{where}: {given[0]!r} is empty; write at least one caption")
    question, image_id = fields.get("question"), fields.get("image_id")
    answers = _texts(fields.get("answers") or [], "answers", where)
    if question is not None:
        (question,) = _texts([question], "question", where) or (None,)
    if (question is None) != (not answers):
        raise DataError(f"{where}: a question needs answers, and answers a question; write both or none")
    unread = tuple(sorted(fields.keys() - _KEYS))
    return Record(image, captions, str(image if image_id is None else image_id), question, answers, unread)


def _texts(values: object, name: str, where: str) -> tuple[str, ...]:
    """Return the texts of a list that are not blank. Raises DataError for another value."""
    if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
        raise DataError(f"{where}: {name!r} is {_echo(values)}; write text, or a list of texts for several")
    return tuple(each for each in values if each.strip())


def _echo(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
