"""Loads PEFT adapters (LoRA and others) of a checkpoint in the Hub's format, merged into its weights."""

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from warnings import catch_warnings

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    PreTrainedModel,
)

from model.checkpoints.foreign_tensors import PEFT_CONFIG, has_adapter_only
from model.checkpoints.frozen.transformers_loading import build_config, silence_transformers
from model.checkpoints.hashing import hash_file
from model.checkpoints.hub.load import RETRIEVAL, load_hub
from model.checkpoints.json_records import read_json
from model.checkpoints.load_options import IN_FLOAT32, LoadOptions
from model.checkpoints.loaded_checkpoint import LoadedCheckpoint
from model.checkpoints.resolve import is_hub_id, resolve
from model.checkpoints.strict_loading import BUILD_ERRORS
from model.checkpoints.tensors import MemoryTensors, TensorFiles
from model.errors import CheckpointError

_ADAPTER_WEIGHTS = "adapter_model.safetensors"


def is_peft_adapter(directory: Path) -> bool:
    """Return whether a directory holds a PEFT adapter. Raises CheckpointError for a whole model beside it."""
    return has_adapter_only(directory)


def find_base_model(directory: Path) -> Path:
    """Return the directory of the model that a PEFT adapter was trained on; it may be an id of the Hub.

    A relative path is that from the adapter's directory, or else from the present one. Raises CheckpointError
    where there is none in the Hub's format.
    """
    path = directory / PEFT_CONFIG
    fields = read_json(path)
    name, revision = fields.get("base_model_name_or_path"), fields.get("revision")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{path} names no 'base_model_name_or_path'; write the path of the model there")
    if (directory / name).is_dir():
        base = directory / name
    else:
        base = resolve(name, revision=str(revision) if revision and is_hub_id(name) else None)
    if base.is_dir() and has_adapter_only(base):
        raise CheckpointError(f"{path} names {name!r}, which is a PEFT adapter itself; merge that one first")
    if base.suffix == ".pth" or read_json(base / "config.json").get("model_type") != "blip-2":
        raise CheckpointError(f"{path} names {name!r}, which is no BLIP-2 in the Hub's format; correct it")
    return base


def load_peft(directory: Path, options: LoadOptions = IN_FLOAT32) -> LoadedCheckpoint:
    """Load a PEFT adapter merged into its base model, whose tokenizer and processor are used.

    Raises CheckpointError where peft is not installed, where adapter and base model do not belong together,
    and where weights of that kind cannot be merged.
    """
    base = find_base_model(directory)
    if find_spec("peft") is None:
        raise CheckpointError(
            f"{directory} is a PEFT adapter of {base}, and peft is not installed; install the extra 'peft' "
            "(pip install 'blip2-server[peft]'), or merge it where peft is installed: "
            f"python -m model.checkpoints convert {directory} MERGED --to hub"
        )
    if not (directory / _ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(
            f"{directory} holds no {_ADAPTER_WEIGHTS}, and pickles are not read, for they may run code; save "
            "it again, with peft's save_pretrained"
        )
    merged = _merge(_load_base(base), directory)
    tensors = MemoryTensors(dict(merged.state_dict()), directory / _ADAPTER_WEIGHTS)
    checkpoint = load_hub(base, options, tensors=tensors)
    sources = (hash_file(directory / _ADAPTER_WEIGHTS), (directory / PEFT_CONFIG).read_text(encoding="utf-8"))
    return LoadedCheckpoint(checkpoint.components, (*checkpoint.sources, *sources))


def _load_base(base: Path) -> PreTrainedModel:
    path = base / "config.json"
    fields = read_json(path)
    files = TensorFiles(base)  # its errors are clearer than those of transformers, and so are the next
    build_config(Blip2Config, path, fields)
    architectures = fields.get("architectures")
    is_retrieval = isinstance(architectures, list) and RETRIEVAL in architectures
    model_class = Blip2ForImageTextRetrieval if is_retrieval else Blip2ForConditionalGeneration
    try:
        with silence_transformers():
            model, loading_info = model_class.from_pretrained(
                base, dtype="auto", use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except (*BUILD_ERRORS, OSError) as error:
        raise CheckpointError(
            f"{base}, the base model of a PEFT adapter, cannot be loaded ({error}); save it again"
        ) from error
    for kind in ("missing_keys", "unexpected_keys"):
        if names := sorted(loading_info[kind]):
            raise CheckpointError(f"{files.path}: transformers reports {kind} {names[:3]}; save it again")
    return model


def _merge(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    from peft import PeftModel, get_peft_model_state_dict

    path = directory / _ADAPTER_WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            saved = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
        _check_rank(saved, directory)
        _check_shapes(saved, model, path)
        with silence_transformers(), catch_warnings(action="ignore"):  # absent tensors are an error below
            wrapped = PeftModel.from_pretrained(model, directory, torch_device="cpu")
            required, known = (
                get_peft_model_state_dict(wrapped, save_embedding_layers=has_embeddings).keys()
                for has_embeddings in (False, True)
            )
            _untie(wrapped)
            merged: PreTrainedModel = wrapped.base_model.merge_and_unload(safe_merge=True)
    except (*BUILD_ERRORS, ImportError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]  # torch names each tensor on a line of its own
        raise CheckpointError(
            f"the PEFT adapter in {directory} cannot be merged into its base model ({reason}); merge it "
            "where it was trained, with model.merge_and_unload(), and save the result"
        ) from error
    if differing := sorted((required - saved.keys()) | (saved.keys() - known)):
        raise CheckpointError(
            f"{path} and its base model do not belong together: the tensor {differing[0]!r} is in one "
            f"of them alone ({len(differing)} in all); correct 'base_model_name_or_path' in {PEFT_CONFIG}"
        )
    return merged


def _check_rank(saved: Mapping[str, Sequence[int]], directory: Path) -> None:
    """Raise CheckpointError where a rank of LoRA, which peft would allocate, is above all sizes."""
    fields, largest = read_json(directory / PEFT_CONFIG), max(chain([0], *saved.values()))
    pattern = fields.get("rank_pattern")
    ranks = [fields.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    rank = max((each for each in ranks if isinstance(each, int)), default=0)
    if fields.get("peft_type") == "LORA" and rank > largest:
        raise CheckpointError(
            f"{directory / PEFT_CONFIG} sets 'r' to {rank}, and the largest size in {_ADAPTER_WEIGHTS} is "
            f"{largest}; use the {PEFT_CONFIG} that was saved with it"
        )


def _check_shapes(saved: Mapping[str, Sequence[int]], model: nn.Module, path: Path) -> None:
    """Raise CheckpointError where an adapter holds whole weights of another shape than its base model has.

    saved: shapes. It is so where the vocabulary was resized before the training.
    """
    shapes = {name: list(each.shape) for name, each in model.state_dict().items()}
    for name, shape in saved.items():
        base_name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if (expected := shapes.get(base_name, shape)) != shape:
            raise CheckpointError(
                f"{path}: the tensor {name!r} has shape {shape}, its base model has {expected}; where "
                "the vocabulary was resized, merge it there, with model.merge_and_unload(), and save the "
                "result with its tokenizer"
            )


def _untie(wrapped: nn.Module) -> None:
    """Copy the weights that an adapter changes in one module alone, and that others share with it.

    peft would merge the change into all of them, a head into the word embeddings for instance.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    owners = Counter(id(each) for module in wrapped.modules() for each in module.parameters(recurse=False))
    for layer in (each for each in wrapped.modules() if isinstance(each, BaseTunerLayer)):
        base = layer.get_base_layer()
        weight = getattr(base, "weight", None)
        if weight is not None and owners[id(weight)] > 1:
            base.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
