"""Records of the user's own data: what is read, and what each fault is told."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from training.data.records import MAX_LINE_BYTES, DataError, Record, open_records
from training.data.texts import clean_caption, clean_question


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_records_are_read_by_their_lines(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "records.jsonl",
        {"image": "a.png", "caption": "a cat"},
        "",
        {"image": "b/ö.jpg", "captions": ["a dog", " ", "Ein Hund"], "image_id": 7, "width": 3},
        {"image": "c.png", "caption": "x", "question": "what?", "answers": ["x", "y"], "captions": None},
    )
    records = open_records(path)
    assert [records[index] for index in (2, 0, 1)] == [
        Record("c.png", ("x",), "c.png", "what?", ("x", "y")),
        Record("a.png", ("a cat",), "a.png"),
        Record("b/ö.jpg", ("a dog", "Ein Hund"), "7", unread_keys=("width",)),
    ]
    assert len(records) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\udcff".encode("utf-8", "surrogateescape").decode("latin-1"), "not JSON"),
        ("3", "it is 3, no object"),
        ({"caption": "a cat"}, "'image' is None; write the path"),
        ({"image": 3, "caption": "a cat"}, "'image' is 3"),
        ({"image": "", "caption": "a cat"}, "'image' is ''"),
        ({"image": "a.png"}, "0 of 'caption' and 'captions'"),
        ({"image": "a.png", "caption": "a", "captions": ["b"]}, "2 of 'caption' and 'captions'"),
        ({"image": "a.png", "caption": ["a"]}, "'caption' is [['a']]; write text"),
        ({"image": "a.png", "captions": "a"}, "'captions' is 'a'; write text, or a list"),
        ({"image": "a.png", "captions": ["a", None]}, "'captions' is ['a', None]"),
        ({"image": "a.png", "captions": []}, "'captions' is empty"),
        ({"image": "a.png", "caption": " "}, "'caption' is empty"),
        ({"image": "a.png", "caption": "a", "question": "what?"}, "a question needs answers"),
        ({"image": "a.png", "caption": "a", "answers": ["b"]}, "and answers a question"),
        ({"image": "a.png", "caption": "a", "question": 3, "answers": ["b"]}, "'question' is [3]"),
        ({"image": "a.png", "caption": "a", "question": "what?", "answers": "b"}, "'answers' is 'b'"),
    ],
)
def test_a_faulty_line_is_named_with_its_number(tmp_path: Path, line: object, message: str) -> None:
    path = write_lines(tmp_path / "records.jsonl", {"image": "a.png", "caption": "a cat"}, "", line)
    records = open_records(path)
    assert records[0].captions == ("a cat",)
    with pytest.raises(DataError, match=rf"records.jsonl, line 3: .*{re.escape(message)}"):
        records[1]


def test_a_line_as_long_as_allowed_is_read_and_a_longer_one_refused(tmp_path: Path) -> None:
    num_others = len(json.dumps({"image": "a", "caption": ""}))
    longest = {"image": "a", "caption": "x" * (MAX_LINE_BYTES - num_others)}
    assert open_records(write_lines(tmp_path / "a.jsonl", longest))[0].image == "a"
    longest["caption"] += "x"
    with pytest.raises(DataError, match="line 1: it has more than 1,048,576 bytes"):
        open_records(write_lines(tmp_path / "b.jsonl", longest))


def coco(**changes: Any) -> dict[str, Any]:
    return {
        "info": {},
        "images": [{"id": 5, "file_name": "5.jpg", "width": 3}, {"id": 6, "file_name": "6.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 5, "caption": "a cat"},
            {"id": 2, "image_id": 6, "caption": "a dog"},
            {"id": 3, "image_id": 5, "caption": "one cat"},
        ],
        **changes,
    }


def test_annotations_of_coco_are_gathered_by_image(tmp_path: Path) -> None:
    records = open_records(write_lines(tmp_path / "captions.json", coco()))
    assert [records[index] for index in range(len(records))] == [
        Record("5.jpg", ("a cat", "one cat"), "5"),
        Record("6.jpg", ("a dog",), "6"),
    ]


def test_an_image_of_coco_without_captions_is_named(tmp_path: Path) -> None:
    records = open_records(write_lines(tmp_path / "captions.json", coco(annotations=[])))
    with pytest.raises(DataError, match=r"captions\.json, image 5: 'captions' is empty"):
        records[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", {"images": []}, "not in COCO's format.*annotations"),
        ("a.json", coco(annotations=[{"image_id": 5}]), "not in COCO's format.*caption"),
        ("a.json", coco(images=[{"id": 5}]), "not in COCO's format.*file_name"),
        ("a.json", "3", "not in COCO's format"),
        ("a.json", '{"image": "a", "caption": "b"}\n{}', "must end in .jsonl"),
        ("a.json", coco(images=[]), "holds no record"),
        ("a.jsonl", "\n \n", "holds no record"),
    ],
)
def test_a_file_that_holds_no_records_is_refused(
    tmp_path: Path, name: str, content: object, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_records(write_lines(tmp_path / name, content))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*nowhere\.jsonl: No such file"):
        open_records(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Cat.", "a cat"),
        ('  "Two dogs"  (one; black)\n', "two dogs one black"),
        ("it's a well-known place, isn't it?", "it's a well-known place, isn't it?"),
        ("a#b*c~d:e", "a b c d e"),
        ("...", ""),
        ("word " * 60, " ".join(["word"] * 50)),
    ],
)
def test_captions_are_cleaned(text: str, expected: str) -> None:
    assert clean_caption(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is THIS? ", "what is this?"),
        ('is it a "cat"?', "is it a cat?"),
        ("a.b", "ab"),
        ("word " * 60, " ".join(["word"] * 50)),
    ],
)
def test_marks_of_questions_are_deleted(text: str, expected: str) -> None:
    assert clean_question(text) == expected
