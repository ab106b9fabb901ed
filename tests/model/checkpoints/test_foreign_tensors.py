"""Checkpoints of other tools: wrapped, quantised and unmerged ones are refused as what they are."""

from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from torch import Tensor

from model import Blip2, CheckpointError
from model.checkpoints.__main__ import main
from model.checkpoints.foreign_tensors import check_names
from tests.model.checkpoints.damage import edit_config, edit_tensors
from tests.model.checkpoints.lavis.lavis_files import Folder, build_tensors, of_stage2

Tensors = dict[str, Tensor]
LAYER = "language_model.model.decoder.layers.0.fc1"


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: each for name, each in tensors.items()}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): each for name, each in tensors.items()}


def with_tensor(name: str, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.zeros(2, dtype=dtype)}


CASES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "torch.compile": (prefixed("_orig_mod."), r"'_orig_mod\..*torch\.compile; save.*model\._orig_mod"),
    "torch.compile of a part": (
        renamed("language_model.", "language_model._orig_mod."),
        r"'language_model\._orig_mod\..*torch\.compile",
    ),
    "DDP": (prefixed("module."), r"'module\..*DistributedDataParallel; save.*model\.module"),
    "DDP of a part": (renamed("qformer.", "qformer.module."), r"'qformer\.module\..*DistributedDataParallel"),
    "DDP of a compiled model": (
        prefixed("module._orig_mod."),
        r"'module\._orig_mod\.query_tokens|torch\.compile",
    ),
    "FSDP": (prefixed("_fsdp_wrapped_module."), r"'_fsdp_wrapped_module\..*wrapped for training"),
    "recomputation": (
        renamed("layers.0.", "layers.0._checkpoint_wrapped_module."),
        r"_checkpoint_wrapped_module.*wrapped for training",
    ),
    "LoRA": (
        renamed("q_proj.weight", "q_proj.base_layer.weight"),
        r"base_layer.*not merged; merge.*merge_and_unload",
    ),
    "LoRA, whole": (prefixed("base_model.model."), r"base_model\.model\..*not merged"),
    "bitsandbytes, 8 bits": (with_tensor(LAYER + ".SCB"), r"fc1\.SCB'.*bitsandbytes.*quantization_config"),
    "bitsandbytes, new names": (with_tensor(LAYER + ".weight_format"), r"weight_format'.*bitsandbytes"),
    "bitsandbytes, 4 bits": (
        with_tensor(LAYER + ".weight.quant_state.bitsandbytes__nf4", torch.uint8),
        r"quant_state.*bitsandbytes.*BLIP2_QUANTIZE=int8",
    ),
    "bitsandbytes, 4 bits, scales": (with_tensor(LAYER + ".weight.absmax"), r"absmax'.*bitsandbytes"),
    "GPTQ": (with_tensor(LAYER + ".qweight", torch.int32), r"qweight'.*a quantised model"),
    "fp8": (with_tensor(LAYER + ".weight_scale"), r"weight_scale'.*a quantised model"),
}


@pytest.fixture
def hub(hub_directory: Path, tmp_path: Path) -> Path:
    return copytree(hub_directory, tmp_path / "hub")


@pytest.mark.parametrize("case", CASES)
def test_the_tensors_of_another_tool_are_named_with_the_cure(
    case: str, hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = CASES[case]

    def edit(tensors: Tensors) -> None:
        changed = change(tensors)
        tensors.clear()
        tensors.update(changed)

    edit_tensors(hub / "model.safetensors", edit)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors holds the tensor .*({expected})"):
        Blip2.from_pretrained(str(hub))
    assert main(["inspect", str(hub)]) == 2
    assert "holds the tensor" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "torchao", "fp8"])
@pytest.mark.parametrize("is_inside", [False, True])
def test_a_configuration_of_quantised_weights_is_refused(method: str, is_inside: bool, hub: Path) -> None:
    quantisation = {"quant_method": method, "load_in_8bit": True}
    edit_config(
        hub,
        lambda fields: (fields["text_config"] if is_inside else fields).update(
            quantization_config=quantisation
        ),
    )
    with pytest.raises(
        CheckpointError,
        match=rf"config\.json has a 'quantization_config' of the method '{method}'.*BLIP2_QUANTIZE",
    ):
        Blip2.from_pretrained(str(hub))


def test_an_empty_quantization_config_is_none(hub: Path) -> None:
    edit_config(hub, lambda fields: fields.update(quantization_config=None))
    assert Blip2.from_pretrained(str(hub)).language_model is not None


@pytest.mark.parametrize(
    ("prefix", "tool"), [("module.", "DistributedDataParallel"), ("_orig_mod.", "torch.compile")]
)
def test_a_file_of_lavis_from_another_tool_is_named_too(prefix: str, tool: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    path = folder.save({"model": prefixed(prefix)(of_stage2(build_tensors()))})
    with pytest.raises(CheckpointError, match=rf"blip2\.pth holds the tensor '{prefix}.*{tool}"):
        Blip2.from_pretrained(path)


def test_the_names_of_published_checkpoints_pass(hub_directory: Path) -> None:
    names = [
        "language_model.encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
        "language_model.model.decoder.layers.0.self_attn.q_proj.bias",
        "qformer.encoder.layer.0.crossattention.attention.query.weight",
        "vision_model.encoder.layers.0.self_attn.qkv.weight",
        "temperature",
    ]
    check_names(names, hub_directory)


def test_the_directory_of_a_language_model_with_an_adapter_is_named(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    path = folder.save(of_stage2(build_tensors()), language_model="lora")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"lora holds a PEFT adapter, not a model; merge.*merge_and_unload"
    ):
        Blip2.from_pretrained(path)
