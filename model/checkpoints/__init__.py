"""Checkpoints: our adapters, the Hub's format and LAVIS', read strictly, never by running code of theirs."""

from dataclasses import replace
from pathlib import Path

from model.checkpoints.adapter.config import FORMAT
from model.checkpoints.adapter.load import find_retrieval_model, load_adapter
from model.checkpoints.adapter.save import save_generation_adapter, save_retrieval_adapter
from model.checkpoints.frozen.vision_model import IN_FLOAT32, load_language_model, load_vision_model
from model.checkpoints.hub.load import load_hub
from model.checkpoints.hub.save import save_hub
from model.checkpoints.json_records import read_json
from model.checkpoints.lavis.load import load_lavis
from model.checkpoints.load_options import LoadOptions, Quantization
from model.checkpoints.loaded_checkpoint import LoadedParts
from model.checkpoints.resolve import ACCEPTED, EMBEDDED, locate
from model.errors import CheckpointError


def load_blip2(
    name_or_path: str, options: LoadOptions = IN_FLOAT32, *, revision: str | None = None
) -> LoadedParts:
    """Loads a checkpoint of whichever format it is, found as `locate` does.

    Raises CheckpointError where there is none, or it is damaged or of a kind that is not supported.
    """
    path = locate(name_or_path, revision=revision)
    if path.suffix == ".pth":
        loaded = load_lavis(path, options)
    else:
        fields = read_json(path / "config.json")
        if fields.get("format") == FORMAT:
            loaded = load_adapter(path, options)
        elif fields.get("model_type") == "blip-2":
            loaded = load_hub(path, options)
        else:
            raise CheckpointError(f"{path / 'config.json'} describes no BLIP-2 checkpoint; give {ACCEPTED}")
    return replace(loaded, sources=(*loaded.sources, options.quantize))


def locate_retrieval_model(name_or_path: str, *, revision: str | None = None) -> Path:
    """Finds what compares: the retrieval adapter that a generation adapter names, else the checkpoint."""
    path = locate(name_or_path, revision=revision)
    return path if path.suffix == ".pth" else find_retrieval_model(path)


__all__ = [
    "EMBEDDED",
    "IN_FLOAT32",
    "LoadOptions",
    "LoadedParts",
    "Quantization",
    "load_adapter",
    "load_blip2",
    "load_hub",
    "load_language_model",
    "load_lavis",
    "load_vision_model",
    "locate",
    "locate_retrieval_model",
    "save_generation_adapter",
    "save_hub",
    "save_retrieval_adapter",
]
