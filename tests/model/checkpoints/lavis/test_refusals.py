"""LAVIS' files that are damaged or of something else: errors name file, tensor and cure."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model import Blip2
from model.errors import CheckpointError
from tests.builders_t5 import build_t5, build_t5_tokenizer
from tests.model.checkpoints.lavis.lavis_files import Folder, build_tensors, of_stage1, of_stage2


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
        (lambda t: t.pop("visual_encoder.pos_embed"), "has no position embeddings"),
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
