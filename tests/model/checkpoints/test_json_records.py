"""JSON files that are damaged, odd or hostile: one error, which names the file."""

import json
import os
from pathlib import Path

import pytest

from model.checkpoints.json_records import read_json
from model.errors import CheckpointError

DEEP = "[" * 65 + "]" * 65


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (json.dumps({"a": 1}).encode("utf-16"), "is not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"[" * 200_000, "is not valid JSON"),
        (b'{"a":' * 3000 + b"1" + b"}" * 3000, "is not valid JSON"),
        (b"[]", "holds no JSON object"),
        (b"null", "holds no JSON object"),
        (f'{{"a": {DEEP[1:-1]}}}'.encode(), "at more than 64 levels"),
    ],
)
def test_a_file_that_holds_no_object_is_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{complaint}") as caught:
        read_json(path)
    assert len(str(caught.value)) < 600


def test_an_object_of_64_levels_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"a": {DEEP[3:-3]}}}')
    assert read_json(tmp_path / "config.json").keys() == {"a"}


def test_a_file_past_64_mib_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"{}")
    os.truncate(path, (64 << 20) + 1)  # a hole, which takes no space
    with pytest.raises(CheckpointError, match=r"has 67,108,865 bytes, the limit is 67,108,864"):
        read_json(path)
