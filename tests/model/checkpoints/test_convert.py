"""Conversion between the three formats, and the summary of a checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from model import Blip2
from model.checkpoints import load_blip2, save_hub
from model.checkpoints.__main__ import main
from model.checkpoints.convert import Format, convert
from model.checkpoints.inspect import inspect
from model.checkpoints.lavis import read_pickle
from model.checkpoints.qformer_branch import qformer_branch_tensors
from model.components import Blip2Components
from model.errors import CheckpointError
from model.vision import VisionEncoder
from tests.builders import build_components, build_matcher, build_vision_model, random_picture
from tests.builders_t5 import build_t5_components
from tests.model.checkpoints.damage import edit_tensors
from tests.model.checkpoints.lavis.lavis_files import Folder, build_tensors, of_stage1, of_stage2

FORMATS: tuple[Format, ...] = ("hub", "lavis", "adapter")


def with_eva_biases(components: Blip2Components) -> Blip2Components:
    """Set the biases as in EVA's encoder, which every format supports: zero for the keys alone."""
    with torch.no_grad():
        for layer in components.vision_model.vit.encoder.layers:
            layer.self_attn.qkv.bias.normal_()[48:96] = 0
    return components


def build_generation(language_family: str) -> Blip2Components:
    return with_eva_biases(
        build_components(seed=4) if language_family == "opt" else build_t5_components("untied", seed=4)
    )


def build_retrieval() -> Blip2Components:
    vision_model, matcher = build_vision_model(seed=4), build_matcher(seed=4)
    components = Blip2Components(
        vision_model=vision_model,
        preprocess=build_components().preprocess,
        ln_vision=matcher.ln_vision,
        query_tokens=matcher.query_tokens,
        qformer=matcher.qformer,
        matcher=matcher,
    )
    return with_eva_biases(components)


def tensors_of(components: Blip2Components) -> dict[str, Tensor]:
    """Return all weights of a model, by our names."""
    tensors = {
        f"vision_model.{name}": each for name, each in components.vision_model.backbone.state_dict().items()
    }
    if components.language_model is not None:
        tensors |= qformer_branch_tensors(components)
        tensors |= {f"llm.{name}": each for name, each in components.language_model.llm.state_dict().items()}
    if components.matcher is not None:
        tensors |= {f"matcher.{name}": each for name, each in components.matcher.state_dict().items()}
    return tensors


def path_for(root: Path, target_format: Format, number: int) -> Path:
    return root / (f"{number}.pth" if target_format == "lavis" else str(number))


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
@pytest.mark.parametrize("language_family", ["opt", "t5"])
def test_a_generation_model_comes_back_bit_for_bit(
    first: Format, second: Format, language_family: str, tmp_path: Path
) -> None:
    components = build_generation(language_family)
    expected = {name: tensor.clone() for name, tensor in tensors_of(components).items()}
    for number, target_format in enumerate((first, second)):
        target = path_for(tmp_path, target_format, number)
        convert(components, target, target_format)
        components = load_blip2(str(target)).components
    assert_equal(tensors_of(components), expected)
    assert components.qformer.config.num_attention_heads == 4


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_a_retrieval_model_comes_back_bit_for_bit_but_for_what_the_hub_drops(
    first: Format, second: Format, tmp_path: Path
) -> None:
    components = build_retrieval()
    expected = {name: tensor.clone() for name, tensor in tensors_of(components).items()}
    for number, target_format in enumerate((first, second)):
        target = path_for(tmp_path, target_format, number)
        left_out = convert(components, target, target_format)
        if target_format == "hub" and "hub" not in (first, second)[:number]:
            assert "the tensor temperature" in left_out
            assert "the tensor text_head.bias" in left_out
        components = load_blip2(str(target)).components
    found = tensors_of(components)
    if "hub" in (first, second):
        expected = {name: each for name, each in expected.items() if "text_head" not in name}
        found["matcher.temperature"] = expected["matcher.temperature"]
        found = {name: each for name, each in found.items() if "text_head" not in name}
    assert_equal(found, expected)


def test_a_file_of_lavis_comes_back_with_its_own_names(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    stage1, stage2 = of_stage1(build_tensors()), of_stage2(build_tensors())
    for number, (tensors, save) in enumerate([(stage1, folder.save_stage1), (stage2, folder.save)]):
        components = load_blip2(save(tensors)).components
        convert(components, tmp_path / f"again-{number}.pth", "lavis")
        tensors.pop("Qformer.bert.embeddings.position_ids", None)  # a buffer
        assert_equal(read_pickle(tmp_path / f"again-{number}.pth"), tensors)


def test_an_adapter_keeps_its_retrieval_model(checkpoint: Path, tmp_path: Path) -> None:
    components = load_blip2(str(checkpoint)).components
    assert convert(components, tmp_path / "copy", "adapter") == []
    assert_equal(tensors_of(load_blip2(str(tmp_path / "copy")).components), tensors_of(components))
    assert any("the retrieval model" in line for line in convert(components, tmp_path / "hub", "hub"))


def test_types_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    components = build_generation("opt")
    components.vision_model.to(torch.bfloat16)
    assert components.language_model is not None
    components.language_model.to(torch.bfloat16)
    save_hub(tmp_path / "hub", components)
    assert main(["convert", str(tmp_path / "hub"), str(tmp_path / "adapter"), "--to", "adapter"]) == 0
    found = {part.name: part.dtypes for part in inspect(tmp_path / "adapter").components}
    assert found["image encoder"] == found["language model"] == ("BF16",)
    assert found["Q-Former"] == ("F32",)
    assert "left out" not in capsys.readouterr().out


def test_an_encoder_that_a_format_lacks_is_refused(tmp_path: Path) -> None:
    components = build_components(seed=4)
    with torch.no_grad():
        components.vision_model.vit.encoder.layers[1].self_attn.qkv.bias[50] = 0.1  # of the keys
    with pytest.raises(CheckpointError, match=r"the key bias in .* is not zero"):
        convert(components, tmp_path / "blip2.pth", "lavis")
    assert list(tmp_path.iterdir()) == []


def test_nothing_beside_a_file_of_lavis_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "blip2.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"blip2\.json exists"):
        convert(build_generation("opt"), tmp_path / "blip2.pth", "lavis")
    assert (tmp_path / "blip2.json").read_text() == "{}"


def test_nothing_is_overwritten(
    hub_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    assert main(["convert", str(hub_directory), str(tmp_path / "there"), "--to", "hub"]) == 2
    assert f"{tmp_path / 'there'} exists" in capsys.readouterr().err


def test_inspect_counts_parameters_and_names_what_is_missing(hub_directory: Path, checkpoint: Path) -> None:
    hub, adapter = inspect(hub_directory), inspect(checkpoint)
    assert hub.kind == "Hub, Blip2ForConditionalGeneration"
    assert hub.missing["/retrieve by ITM"] == ("Q-Former, text branch", "ITM head")
    assert "/caption and /vqa" not in hub.missing
    assert adapter.missing == {}
    blip2 = Blip2.from_pretrained(str(checkpoint))
    assert blip2.language_model is not None
    assert blip2.matcher is not None
    counts = {part.name: part.num_parameters for part in adapter.components}
    assert counts["image encoder"] == sum(each.numel() for each in blip2.vision_model.parameters())
    assert counts["language model"] == sum(each.numel() for each in blip2.language_model.llm.parameters())
    assert counts["queries"] == blip2.query_tokens.numel()
    text_branch = sum(
        each.numel()
        for layer in blip2.matcher.qformer.layers
        for part in (layer.intermediate, layer.output)
        if part is not None
        for each in part.parameters()
    )
    assert counts["Q-Former, text branch"] == text_branch


def test_inspect_counts_the_frozen_parts_that_a_file_of_lavis_names(tmp_path: Path) -> None:
    convert(build_generation("opt"), tmp_path / "blip2.pth", "lavis")
    summary = inspect(tmp_path / "blip2.pth")
    assert "/caption and /vqa" not in summary.missing
    assert {"image encoder", "language model"} <= {part.name for part in summary.components}


def test_inspect_prints_a_table(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint)]) == 0
    printed = capsys.readouterr().out
    assert "adapter, generation" in printed
    assert "language model" in printed
    assert main(["inspect", "nowhere"]) == 2


def test_a_directory_of_checkpoints_names_them(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = checkpoint.parent
    (root / "blip2.pth").touch()
    assert main(["inspect", str(root)]) == 2
    named = ", ".join(
        str(root / name) for name in ("blip2.pth", "language_model", "stage1", "stage2", "vision_model")
    )
    assert (
        f"{root} is no checkpoint itself, and holds {named} (5 in all); give one" in capsys.readouterr().err
    )
    with pytest.raises(CheckpointError, match="is no checkpoint itself"):
        load_blip2(str(root))


def test_a_reader_that_leaves_ends_the_command_quietly(checkpoint: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "model.checkpoints", "inspect", str(checkpoint)]
    ended = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.fixture
def picture(tmp_path: Path) -> str:
    random_picture(0).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


@pytest.mark.parametrize("language_family", ["opt", "t5"])
def test_a_generation_model_is_verified_against_transformers(
    language_family: str, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(build_generation(language_family), tmp_path / "model.pth", "lavis")
    assert main(["verify", str(tmp_path / "model.pth"), picture, "--text", "a photo of"]) == 0
    printed = capsys.readouterr().out
    assert "answers that differ, of 2" in printed
    assert "TOO LARGE" not in printed


def test_a_retrieval_model_is_verified_against_transformers(
    picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(build_retrieval(), tmp_path / "model", "adapter")
    assert main(["verify", str(tmp_path / "model"), picture, "--text", "a red circle"]) == 0
    assert "ITM probabilities" in capsys.readouterr().out


def test_a_difference_from_transformers_is_found(
    picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(build_generation("opt"), tmp_path / "model", "hub")

    def disturb(module: nn.Module, _args: object, output: Tensor) -> Tensor | None:
        is_ours = isinstance(module, VisionEncoder)
        return output + 0.01 * output.roll(1, dims=-1) if is_ours else None

    with register_module_forward_hook(disturb):  # type: ignore[arg-type]  # a hook may replace the output
        assert main(["verify", str(tmp_path / "model"), picture]) == 1
    assert "TOO LARGE" in capsys.readouterr().out


def test_a_damaged_target_is_no_secret(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_tensors(checkpoint / "adapter.safetensors", lambda tensors: tensors.pop("query_tokens"))
    assert main(["verify", str(checkpoint), "no.png"]) == 2
    assert "verify: " in capsys.readouterr().err
