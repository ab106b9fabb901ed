"""Checkpoints: adapters, the Hub's format and LAVIS', read strictly, without running code in them."""

from dataclasses import replace
from pathlib import Path

from model.checkpoints.adapter import (
    FORMAT,
    find_retrieval_model,
    load_adapter,
    save_generation_adapter,
    save_retrieval_adapter,
)
from model.checkpoints.frozen import load_language_model, load_vision_model
from model.checkpoints.hub import load_hub, save_hub
from model.checkpoints.hub.peft import is_peft_adapter, load_peft
from model.checkpoints.json_records import read_json
from model.checkpoints.lavis import load_lavis
from model.checkpoints.load_options import IN_FLOAT32, LoadOptions, Quantization
from model.checkpoints.loaded_checkpoint import LoadedCheckpoint
from model.checkpoints.qformer_branch import QFormerBranch
from model.checkpoints.resolve import ACCEPTED, EMBEDDED, resolve
from model.errors import CheckpointError


def load_blip2(
    name_or_path: str, options: LoadOptions = IN_FLOAT32, *, revision: str | None = None
) -> LoadedCheckpoint:
    """Load a checkpoint of any format; its name is resolved by `resolve`.

    Raises CheckpointError where there is none, or it is damaged or of an unsupported kind.
    """
    path = resolve(name_or_path, revision=revision)
    if path.suffix == ".pth":
        checkpoint = load_lavis(path, options)
    elif is_peft_adapter(path):
        checkpoint = load_peft(path, options)
    else:
        fields = read_json(path / "config.json")
        if fields.get("format") == FORMAT:
            checkpoint = load_adapter(path, options)
        elif fields.get("model_type") == "blip-2":
            checkpoint = load_hub(path, options)
        else:
            raise CheckpointError(f"{path / 'config.json'} describes no BLIP-2 checkpoint; give {ACCEPTED}")
    return replace(checkpoint, sources=(*checkpoint.sources, options.quantize))


def resolve_retrieval_model(name_or_path: str, *, revision: str | None = None) -> Path:
    """Return the path of a retrieval model: the adapter that a generation adapter names, else its own."""
    path = resolve(name_or_path, revision=revision)
    return path if path.suffix == ".pth" or is_peft_adapter(path) else find_retrieval_model(path)


__all__ = [
    "EMBEDDED",
    "IN_FLOAT32",
    "LoadOptions",
    "LoadedCheckpoint",
    "QFormerBranch",
    "Quantization",
    "load_adapter",
    "load_blip2",
    "load_hub",
    "load_language_model",
    "load_lavis",
    "load_vision_model",
    "resolve",
    "resolve_retrieval_model",
    "save_generation_adapter",
    "save_hub",
    "save_retrieval_adapter",
]
