"""Checkpoints as other tools leave them: each is refused as what it is, with its cure."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from model.errors import CheckpointError

PEFT_CONFIG = "adapter_config.json"
_WHOLE_WEIGHTS = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-*.bin",
)
_UNWRAP = "save the state dict of the model inside the wrapper, model.{}, instead of the wrapper's"
_UNQUANTISED = (
    "give the checkpoint that it was made of, which BLIP2_QUANTIZE=int8 holds in 8 bits, or save what "
    "transformers' model.dequantize() returns"
)
_MERGE = "merge them, with model.merge_and_unload() of peft, and save the result"
_MARKS: Sequence[tuple[re.Pattern[str], str, str]] = (  # of a name; what it is of, and the cure
    (re.compile(r"(^|\.)_orig_mod\."), "a model compiled by torch.compile", _UNWRAP.format("_orig_mod")),
    (
        re.compile(r"^(\w+\.)?module\."),
        "a model wrapped by DistributedDataParallel",
        _UNWRAP.format("module"),
    ),
    (
        re.compile(r"(^|\.)(_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."),
        "a model wrapped for training",
        "save the state dict of the whole model, without the wrapper's names",
    ),
    (
        re.compile(r"\.base_layer\.|\.lora_|\.modules_to_save\.|^base_model\.model\."),
        "a PEFT model whose LoRA weights are not merged",
        _MERGE,
    ),
    (
        re.compile(
            r"\.(SCB|weight_format)$|\.(absmax|quant_map|nested_absmax|nested_quant_map)$|\.quant_state\."
        ),
        "a model quantised by bitsandbytes (see quantization_config in its config.json)",
        _UNQUANTISED,
    ),
    (
        re.compile(r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale|weight_scale_inv)$"),
        "a quantised model (see quantization_config in its config.json)",
        _UNQUANTISED,
    ),
)


def check_names(names: Iterable[str], path: Path) -> None:
    """Raise CheckpointError where tensors are named as a wrapper, PEFT or a quantiser names them."""
    for name in names:
        for mark, tool, cure in _MARKS:
            if mark.search(name):
                raise CheckpointError(f"{path} holds the tensor {name!r}, as of {tool}; {cure}")


def check_unquantised(fields: Mapping[str, object], path: Path) -> None:
    """Raise CheckpointError where a configuration, or one inside it, says that weights are quantised."""
    for config in (fields, *fields.values()):
        quantisation = config.get("quantization_config") if isinstance(config, Mapping) else None
        if quantisation:
            method = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else None
            raise CheckpointError(
                f"{path} has a 'quantization_config' of the method {method!r}: its weights are quantised; "
                f"{_UNQUANTISED}"
            )


def check_merged(directory: Path) -> None:
    """Raise CheckpointError where the directory of a frozen model holds a PEFT adapter."""
    if has_adapter_only(directory):
        raise CheckpointError(f"{directory} holds a PEFT adapter, not a model; {_MERGE}")


def has_adapter_only(directory: Path) -> bool:
    """Return whether a directory holds a PEFT adapter.

    Raises CheckpointError where it holds weights of a whole model, too: transformers and peft apply the
    adapter to its base model and ignore those weights, and nothing says which of the two is meant.
    """
    if not (directory / PEFT_CONFIG).is_file():
        return False
    weights = sorted(each.name for pattern in _WHOLE_WEIGHTS for each in directory.glob(pattern))
    if weights:
        raise CheckpointError(
            f"{directory} holds both a PEFT adapter ({PEFT_CONFIG}) and the weights of a whole model "
            f"({weights[0]}); put the adapter's files into a directory of their own to have it merged, or "
            "delete them if it is merged into the weights"
        )
    return True
