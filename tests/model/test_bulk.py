"""Bulk tasks without a server: correct records, and runs that can be continued."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from benchmarks.process_memory import resident_bytes
from model import Blip2, GenerationParams, TaskUnavailableError
from model.__main__ import main
from model.bulk import build_captioning, find_images
from model.errors import ModelError
from model.vision import VisionEncoder
from tests.builders import random_picture


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Save five pictures in a directory and one below it; one is damaged, one is rotated by its EXIF."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for index in range(5):
        path = (folder / "more" if index == 4 else folder) / f"{index}.png"
        picture = random_picture(index)
        exif = picture.getexif()
        exif[0x0112] = 6 if index == 1 else 1
        picture.save(path, exif=exif)
    damaged = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(damaged[: len(damaged) // 2])
    (folder / "notes.txt").write_text("no image")
    return folder


def test_images_of_a_directory_are_found_whatever_their_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "more.png"
    folder.mkdir()
    visible = [
        *("a.png", "b.APNG", "c.jpg", "d.jpeg", "e.JPE", "f.jfif", "g.bmp", "h.dib", "i.webp", "j.gif"),
        *("k.tif", "l.tiff", "m.avif", "n.heic", "o.heif", "p.jp2", "q.j2k", "more.png/r.jpg"),
    ]
    for name in visible:
        (tmp_path / name).write_bytes(b"of its suffix alone")
    random_picture(0).save(tmp_path / "without_suffix", "JPEG")
    (tmp_path / "README").write_text("no image")
    (tmp_path / "table.csv").write_text("no image")
    invisible = ["._a.png", ".b.jpg", ".thumbnails/c.png", "more.png/._r.jpg", ".DS_Store"]
    for name in invisible:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_images([tmp_path])
    assert found == sorted(tmp_path / name for name in [*visible, "without_suffix"])
    assert caplog.messages == [f"{tmp_path}: left out 2 files that are no images, as README"]
    assert find_images([tmp_path / ".b.jpg", tmp_path / "README"]) == [
        tmp_path / ".b.jpg",
        tmp_path / "README",
    ]


def test_a_directory_without_visible_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "._a.png").write_bytes(b"")
    with pytest.raises(ModelError, match=r"holds no images \(\.apng, .*; name another directory"):
        find_images([tmp_path])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.inference_mode()
def inputs_of(blip2: Blip2, path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        pixels = blip2.preprocess(image.transpose(Image.Transpose.ROTATE_270) if path.stem == "1" else image)
    return blip2.project_queries(blip2.encode_queries(blip2.encode_images(pixels[None])))


@torch.inference_mode()
def test_every_image_gets_its_own_caption_and_a_damaged_one_an_error(
    random_checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "captions.jsonl"
    options = ["--model", str(random_checkpoint), "--out", str(out), "--batch-size", "2"]
    assert main(["caption", str(pictures), "--prompt", "a photo of", *options]) == 1
    blip2 = Blip2.from_pretrained(str(random_checkpoint))
    found = {Path(line["image"]).stem: line for line in lines(out)}
    assert list(found) == ["0", "1", "2", "3", "4"]
    assert "truncated" in found["2"].pop("error")
    for name in ("0", "1", "3", "4"):
        path = Path(found[name]["image"])
        (expected,) = blip2.generate(
            inputs_of(blip2, path), ["a photo of"], GenerationParams(max_new_tokens=30)
        )
        (caption,) = found[name]["captions"]
        assert caption["text"] == expected[0].text
        assert caption["score"] == pytest.approx(expected[0].score, abs=1e-5)


def test_an_interrupted_run_is_continued_where_it_stopped(
    random_checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    command = ["caption", str(pictures), "--model", str(random_checkpoint), "--batch-size", "1"]
    assert main([*command, "--out", str(tmp_path / "whole.jsonl")]) == 1
    whole = (tmp_path / "whole.jsonl").read_bytes()
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(whole[: len(whole) - 30])  # in the middle of the last line
    encoded: list[int] = []

    def count(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, VisionEncoder):
            encoded.append(len(args[0]))

    with register_module_forward_pre_hook(count):
        assert main([*command, "--out", str(cut)]) == 1  # one picture is unreadable
    assert cut.read_bytes() == whole
    assert encoded == [1]
    assert main([*command, "--out", str(cut)]) == 1
    assert cut.read_bytes() == whole


def test_questions_are_answered_in_their_order(
    random_checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    questions = ["how many stars", "what color is the circle"]
    options = [each for question in questions for each in ("--question", question)]
    image = str(pictures / "0.png")
    assert main(["ask", image, *options, "--model", str(random_checkpoint), "--out", str(out)]) == 0
    (line,) = lines(out)
    blip2 = Blip2.from_pretrained(str(random_checkpoint))
    params = GenerationParams(num_beams=5, max_new_tokens=10, length_penalty=-1.0)
    for answer, question in zip(line["answers"], questions, strict=True):
        inputs = inputs_of(blip2, pictures / "0.png")
        (expected,) = blip2.generate(inputs, [blip2.prompts.question_prompt(question)], params)
        assert answer["answer"] == expected[0].text
    assert line["questions"] == questions


@torch.inference_mode()
def test_texts_are_scored_against_every_image(
    random_checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "matches.jsonl"
    texts = ["a red circle", "two blue stars above a cross"]
    options = [each for text in texts for each in ("--text", text)]
    images = [str(pictures / "0.png"), str(pictures / "3.png")]
    assert main(["match", *images, *options, "--model", str(random_checkpoint), "--out", str(out)]) == 0
    blip2 = Blip2.from_pretrained(str(random_checkpoint))
    assert blip2.matcher is not None
    tokens = blip2.matcher.tokenize(texts)
    for line, path in zip(lines(out), images, strict=True):
        with Image.open(path) as image:
            features = blip2.encode_images(blip2.preprocess(image)[None])
        probabilities = blip2.matcher.match_logits(features.expand(2, -1, -1), *tokens).softmax(1)[:, 1]
        assert line["texts"] == texts
        found = [match["itm_probability"] for match in line["matches"]]
        assert found == pytest.approx(probabilities.tolist(), abs=1e-5)


def test_other_questions_do_not_go_into_the_same_file(
    random_checkpoint: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["ask", str(pictures / "0.png"), "--model", str(random_checkpoint)]
    command += ["--out", str(tmp_path / "out.jsonl")]
    assert main([*command, "--question", "how many stars"]) == 0
    assert main([*command, "--question", "how many stars"]) == 0
    for other in (
        ["how many circle"],
        ["how many stars", "--beams", "3"],
        ["how many stars", "--model", "tiny"],
    ):
        assert main([*command, "--question", *other]) == 2
        assert "holds answers to something else than" in capsys.readouterr().err


def test_a_file_of_another_kind_is_not_written_to(
    random_checkpoint: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "notes.txt"
    for content in ("my notes\n", "my notes", '{"a": 1}', "one\ntwo"):
        out.write_text(content)
        assert main(["caption", str(pictures), "--model", str(random_checkpoint), "--out", str(out)]) == 2
        assert "lines that this command did not write" in capsys.readouterr().err
        assert out.read_text() == content


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["caption", "nowhere"], "nowhere is not there"),
        (["caption", str(Path(__file__).parent / "generation")], "holds no images"),
        (["caption", ".", "--model", "no-such-model"], "there is no checkpoint 'no-such-model'"),
    ],
)
def test_errors_are_printed_in_one_line(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "out.jsonl")]) == 2
    assert complaint in capsys.readouterr().err


def test_a_checkpoint_without_the_component_is_refused(random_checkpoint: Path) -> None:
    blip2 = Blip2.from_pretrained(str(random_checkpoint.parent / "stage1"))
    with pytest.raises(TaskUnavailableError, match="has no language model"):
        build_captioning(blip2, None, GenerationParams())


def test_a_damaged_file_that_is_read_has_warnings(random_checkpoint: Path, tmp_path: Path) -> None:
    random_picture(0).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-2])
    out = tmp_path / "captions.jsonl"
    assert main(["caption", str(tmp_path), "--model", str(random_checkpoint), "--out", str(out)]) == 0
    cut, whole = lines(out)
    (warning,) = cut.pop("warnings")
    assert "the JPEG has no end marker" in warning
    assert cut["captions"][0]["text"] == whole["captions"][0]["text"]
    assert "warnings" not in whole


def test_no_file_is_opened_by_the_plugin_of_another_format(random_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n")
    random_picture(0).save(folder / "picture.png", "PPM")
    random_picture(0).save(folder / "photo.jfif", "JPEG")
    out = tmp_path / "captions.jsonl"
    assert main(["caption", str(folder), "--model", str(random_checkpoint), "--out", str(out)]) == 1
    found = {Path(line["image"]).name: line for line in lines(out)}
    assert list(found) == ["photo.jfif", "picture.png", "script.jpg"]
    assert "error" not in found["photo.jfif"]
    for name in ("picture.png", "script.jpg"):
        assert "none of JPEG, PNG" in found[name]["error"]


@contextmanager
def broken_images(values: dict[int, float]) -> Iterator[None]:
    """Have the image encoder return other numbers for the n-th image of the run."""
    num_encoded = 0

    def break_features(module: nn.Module, _: object, features: torch.Tensor) -> torch.Tensor:
        nonlocal num_encoded
        if isinstance(module, VisionEncoder):
            for row in range(len(features)):
                features[row] *= values.get(num_encoded, 1.0)
                num_encoded += 1
        return features

    with register_module_forward_hook(break_features):  # type: ignore[arg-type] # torch's annotation is wrong
        yield


COMMANDS = [["caption"], ["ask", "--question", "how many stars"], ["match", "--text", "a red circle"]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_whose_scores_are_not_finite_is_an_error_and_writes_nothing(
    command: list[str],
    value: float,
    random_checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.jsonl"
    options = ["--model", str(random_checkpoint), "--out", str(out), "--batch-size", "1"]
    with broken_images(dict.fromkeys(range(9), value)):
        assert main([*command, str(pictures), *options]) == 2
    assert "0.png: the model gave a score that is not finite; check the weights" in capsys.readouterr().err
    assert out.read_text() == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_one_image_whose_scores_are_not_finite_has_an_error_of_its_own(
    command: list[str], random_checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "2.png").unlink()
    out = tmp_path / "out.jsonl"
    options = ["--model", str(random_checkpoint), "--out", str(out), "--batch-size", "3"]
    with broken_images({1: math.nan}):
        assert main([*command, str(pictures), *options]) == 1
    found = {Path(line["image"]).stem: line for line in lines(out)}
    assert list(found) == ["0", "1", "3", "4"]
    assert "a score that is not finite" in found["1"]["error"]
    assert not any("error" in found[name] for name in ("0", "3", "4"))
    assert "NaN" not in out.read_text()


def test_memory_of_large_images_is_given_back(random_checkpoint: Path, tmp_path: Path) -> None:
    random_picture(0).save(tmp_path / "small.png")
    for index in range(3):  # 80 MB each
        Image.new("RGBA", (5000, 4000 + index)).save(tmp_path / f"large{index}.png", compress_level=1)
    options = ["--model", str(random_checkpoint), "--batch-size", "1"]
    assert main(["caption", str(tmp_path / "small.png"), *options, "--out", str(tmp_path / "1.jsonl")]) == 0
    before = resident_bytes(os.getpid())
    assert main(["caption", str(tmp_path), *options, "--out", str(tmp_path / "2.jsonl")]) == 0
    assert resident_bytes(os.getpid()) - before < 60 * 2**20
