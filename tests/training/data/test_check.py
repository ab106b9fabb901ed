"""The check of the user's own data: by the command, on pictures of which some cannot be used."""

import json
from pathlib import Path

import pytest
from PIL import Image

from training.__main__ import main
from training.data.check import check_data


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Write ten records, of which two cannot be used."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for index in range(10):
        Image.new("RGB", (40, 30), (index * 20, 0, 0)).save(folder / f"{index}.png")
        lines.append({"image": f"{index}.png", "captions": [f"Picture {index}.", "<b> & more"], "width": 40})
    (folder / "3.png").unlink()
    (folder / "7.png").write_bytes(b"no picture")
    lines[5] |= {"question": "which number?", "answers": ["5", "five"]}
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_what_can_be_used_is_counted_and_the_rest_named(records: Path) -> None:
    check = check_data(records, records.parent / "pictures", num_samples=10)
    assert (check.num_records, check.num_faulty, check.num_captions, check.num_questions) == (10, 2, 16, 1)
    missing, damaged = check.faults
    assert "3.png: No such file" in missing
    assert "7.png: " in damaged
    assert check.unread_keys == {"width": 8}
    assert check.num_words == {2: 8, 3: 8}
    assert [sample.image_id for sample in check.samples] == [
        f"{index}.png" for index in range(10) if index not in (3, 7)
    ]


def test_the_command_writes_a_page_and_fails_above_the_share(
    records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["data", "check", str(records), "--images", str(records.parent / "pictures")]
    assert main([*arguments, "--max-faulty", "0.2"]) == 0
    assert "10 records, 2 of them cannot be used; 16 captions, 1 questions" in capsys.readouterr().out
    page = records.with_suffix(".html").read_text()
    assert page.count("data:image/jpeg;base64,") == 8
    assert "&lt;b&gt; &amp; more" in page
    assert "<b>" not in page
    assert main([*arguments, "--max-faulty", "0.19"]) == 1
    assert (
        "2 of 10 records cannot be used, 20.0%, and the limit is 19.0%; the first: "
        in capsys.readouterr().err
    )


def test_a_folder_that_is_none_is_an_error_before_anything_is_read(
    records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(records), "--images", str(records.parent / "nowhere")]) == 1
    assert "nowhere is no folder" in capsys.readouterr().err
    assert not records.with_suffix(".html").exists()


def test_of_many_records_the_page_shows_so_many(records: Path) -> None:
    check = check_data(records, records.parent / "pictures", num_samples=2)
    assert len(check.samples) <= 2
    assert check.num_records == 10
