import json
from pathlib import Path
from typing import Any

from PIL import Image

from training.__main__ import main


def draw(directory: Path, split: str) -> list[dict[str, Any]]:
    arguments = ["--seed", "5", "--count", "3", "--split", split, "--out", str(directory)]
    assert main(["scenes", *arguments]) == 0
    return [json.loads(line) for line in (directory / "scenes.jsonl").read_text().splitlines()]


def test_the_command_writes_images_and_what_is_true_of_them(tmp_path: Path) -> None:
    rows = draw(tmp_path, "unseen")
    assert [row["image"] for row in rows] == ["00000.png", "00001.png", "00002.png"]
    with Image.open(tmp_path / "00002.png") as image:
        assert image.size == (96, 96)
    assert set(rows[0]) == {"image", "objects", "background", "captions", "questions"}
    assert set(rows[0]["objects"][0]) == {"shape", "color", "size", "texture", "x", "y"}
    assert set(rows[0]["questions"][0]) == {"family", "question", "answer"}


def test_the_same_seed_writes_the_same_files_and_another_split_others(tmp_path: Path) -> None:
    first, second, other = (
        draw(tmp_path / "a", "unseen"),
        draw(tmp_path / "b", "unseen"),
        draw(tmp_path / "c", "train"),
    )
    assert first == second != other
    assert (tmp_path / "a" / "00001.png").read_bytes() == (tmp_path / "b" / "00001.png").read_bytes()
