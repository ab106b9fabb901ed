"""LAVIS' files that are damaged or of something else: errors name file, tensor and cure."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch

from model import Blip2
from model.errors import CheckpointError
from tests.builders_t5 import build_t5, build_t5_tokenizer
from tests.model.checkpoints.lavis.lavis_files import Folder, build_tensors, of_stage1, of_stage2

V_BIAS = "visual_encoder.blocks.0.attn.v_bias"
FFN = "Qformer.bert.encoder.layer.0.intermediate_query.dense.weight"


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return (print, ("this must not run",))


def refusal(path: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        Blip2.from_pretrained(path)
    return str(caught.value)


def test_a_pickle_that_runs_code_is_refused(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(folder.save({"model": of_stage2(build_tensors()), "config": Bomb()}))
    assert "would run code" in message
    assert "this must not run" not in capsys.readouterr().out


def test_a_truncated_file_is_refused(folder: Folder) -> None:
    path = Path(folder.save(of_stage2(build_tensors())))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert f"cannot read {path}" in refusal(str(path))


@pytest.mark.parametrize("content", [b"", b"\x80", b"\x80\x02}q", b"<!DOCTYPE html>", b"\0" * 1024])
def test_a_file_of_other_bytes_is_named(folder: Folder, content: bytes) -> None:
    path = Path(folder.save(of_stage2(build_tensors())))
    path.write_bytes(content)
    message = refusal(str(path))
    assert str(path) in message
    assert "copy it again" in message


def test_a_file_of_torchs_first_format_is_refused_with_any_byte_of_its_head_changed(folder: Folder) -> None:
    path = Path(folder.save(of_stage2(build_tensors())))
    torch.save({"query_tokens": torch.zeros(1, 8, 32)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for place in range(0, 600, 3):
        for value in (0x00, 0x2E, 0x68, 0xFF):
            path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
            assert str(path) in refusal(str(path))


def test_a_compressed_zip_is_refused_before_it_is_unpacked(folder: Folder) -> None:
    path = Path(folder.save(of_stage2(build_tensors())))
    with ZipFile(path, "w", ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\0" * 1_000_000)
    assert f"{path} is a compressed zip file" in refusal(str(path))


@pytest.mark.parametrize(
    "name",
    [
        "Qformer.bert.embeddings.word_embeddings.weight",
        "Qformer.bert.embeddings.position_embeddings.weight",
        "text_proj.weight",
    ],
)
def test_wrong_tensors_of_a_stage_1_file_are_named(folder: Folder, name: str) -> None:
    tensors = of_stage1(build_tensors())
    tensors[name] = torch.zeros(())
    assert "has shape [], 2 dimensions are needed" in refusal(folder.save_stage1(tensors))


def test_a_text_branch_without_positions_is_refused(folder: Folder) -> None:
    tensors = of_stage1(build_tensors())
    tensors["Qformer.bert.embeddings.position_embeddings.weight"] = torch.zeros(0, 32)
    assert "max_position_embeddings is 0; it must be at least 1" in refusal(folder.save_stage1(tensors))


def test_a_joint_projection_of_clip_that_cannot_be_split_is_named(folder: Folder) -> None:
    name = "visual_encoder.transformer.resblocks.0.attn.in_proj_weight"
    for shape in ((), (0, 3), (4, 3)):
        path = folder.save({**of_stage2(build_tensors()), name: torch.zeros(shape)})
        assert f"the tensor {name!r} has shape {list(shape)}" in refusal(path)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (
            {"arch": "blip2_vicuna"},
            "'arch': Input should be 'blip2', 'blip2_opt' or 'blip2_t5'; it is 'blip2_vicuna'",
        ),
        ({"arch": "blip2"}, "needs a 'tokenizer'"),
        ({"language_model": None}, "needs a 'language_model'"),
        ({"lanugage_model": "opt"}, "unknown key 'lanugage_model'"),
        ({"vision_model": "nowhere"}, "cannot read"),
        ({"image_size": 50}, "image size 50 is no multiple of the patch size 8"),
        ({"arch": "blip2_t5"}, "arch is 'blip2_t5', the tensors of"),
        ({"num_attention_heads": 3}, "is not a multiple of num_attention_heads 3"),
        ({"num_attention_heads": -1}, "num_attention_heads is -1; it must be at least 1"),
        ({"image_size": 257 * 8}, "image size 2056 is out of range; with patches of 8 px, 8 to 2048 px"),
        ({"image_size": 10**9}, "image size 1000000000 is out of range"),
        ({"image_size": -8}, "image size -8 is out of range"),
    ],
)
def test_a_wrong_entry_in_the_json_is_named(folder: Folder, fields: dict[str, Any], complaint: str) -> None:
    assert complaint in refusal(folder.save(of_stage2(build_tensors()), **fields))


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda t: t.pop("query_tokens"), "holds no Q-Former"),
        (lambda t: t.pop("opt_proj.bias"), "lacks the tensor 'language_projection.bias'"),
        (
            lambda t: t.pop("visual_encoder.blocks.0.attn.v_bias"),
            "but no visual_encoder.blocks.0.attn.v_bias",
        ),
        (
            lambda t: t.update({"momentum.queue": torch.zeros(2)}),
            "the tensor 'momentum.queue', which no BLIP-2",
        ),
        (lambda t: t.update({"ln_vision.bias": torch.zeros(3)}), "'ln_vision.bias' has shape [3]"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("visual_")], "cannot read"),
        (lambda t: t.update(model=3), "holds no state dict"),
        (
            lambda t: t.pop("visual_encoder.pos_embed"),
            "blip2.pth: its image encoder has no position embeddings",
        ),
        (
            lambda t: t.update({"visual_encoder.pos_embed": torch.zeros(())}),
            "embeddings of its image encoder have",
        ),
        (lambda t: t.update({"visual_encoder.pos_embed": torch.zeros(1, 0, 48)}), "have shape [1, 0, 48]"),
        (
            lambda t: t.update({V_BIAS: torch.zeros(())}),
            "visual_encoder.blocks.0.attn.*_bias have the shapes [48]",
        ),
        (lambda t: t.update({V_BIAS: torch.zeros(1, 48)}), "[48] and [1, 48]; each must have"),
        (
            lambda t: t.update(query_tokens=torch.zeros(8)),
            "'query_tokens' has shape [8], 3 dimensions are needed",
        ),
        (
            lambda t: t.update(query_tokens=torch.zeros(1, 0, 32)),
            "num_query_tokens is 0; it must be at least 1",
        ),
        (lambda t: t.update({FFN: torch.zeros(())}), "has shape [], 2 dimensions are needed"),
        (lambda t: t.update(query_tokens=3), "'query_tokens' is a int, no tensor"),
        (lambda t: t.update({5: torch.zeros(1)}), "holds no state dict"),
        (lambda t: t.update(query_tokens=t["query_tokens"].to_sparse()), "'query_tokens' is no dense one"),
        (lambda t: t.update(query_tokens=t["query_tokens"].to("meta")), "'query_tokens' is no dense one"),
        (lambda t: t.update(query_tokens=torch.zeros(1).expand(1, 10**6, 10**6)), "is no dense one"),
        (lambda t: t.update({"Qformer.bert.encoder.layer.99999999.x": torch.zeros(1)}), "lacks the tensor"),
        (
            lambda t: t.update({"Qformer.bert.encoder.layer.x.y": torch.zeros(1)}),
            "'qformer.encoder.layer.x.y'",
        ),
        (lambda t: t.update({"Qformer.bert.encoder.layer.": torch.zeros(1)}), "'qformer.encoder.layer.'"),
    ],
)
def test_wrong_tensors_are_named(
    folder: Folder, edit: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    tensors: dict[str, Any] = of_stage2(build_tensors())
    edit(tensors)
    assert complaint in refusal(folder.save(tensors))


def test_a_text_head_that_is_not_tied_is_refused(folder: Folder) -> None:
    tensors = of_stage1(build_tensors())
    tensors["Qformer.cls.predictions.decoder.weight"] = torch.zeros_like(
        tensors["Qformer.cls.predictions.decoder.weight"]
    )
    assert "differs from the word embeddings" in refusal(folder.save_stage1(tensors))


def test_a_language_model_of_another_family_is_refused(folder: Folder) -> None:
    build_t5("untied").save_pretrained(folder.path / "t5")
    build_t5_tokenizer().save_pretrained(folder.path / "t5")
    message = refusal(folder.save(of_stage2(build_tensors()), language_model="t5"))
    assert "arch is 'blip2_opt', and 'language_model' is of type 't5'" in message


def test_a_file_of_torchs_first_format_is_read(folder: Folder) -> None:
    path = folder.save(of_stage2(build_tensors()))
    torch.save(of_stage2(build_tensors()), path, _use_new_zipfile_serialization=False)
    assert Blip2.from_pretrained(path).language_model is not None


def test_a_file_without_its_json_says_what_is_needed(folder: Folder) -> None:
    path = folder.save(of_stage2(build_tensors()))
    (folder.path / "blip2.json").unlink()
    assert "blip2.json" in refusal(path)


def test_an_encoder_named_by_kind_must_be_in_the_file(folder: Folder) -> None:
    partial = {k: v for k, v in of_stage2(build_tensors()).items() if not k.startswith("visual_encoder.")}
    assert "holds no image encoder (visual_encoder.*)" in refusal(
        folder.save(partial, vision_model="eva_clip_g")
    )
