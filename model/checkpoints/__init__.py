"""Checkpoints: our adapters, the Hub's format and LAVIS', read strictly, never by running code of theirs."""

from pathlib import Path

import torch

from model.checkpoints.adapter import load_adapter
from model.checkpoints.adapter_config import FORMAT
from model.checkpoints.frozen import load_language_model, load_vision_model
from model.checkpoints.hub import load_hub
from model.checkpoints.lavis import load_lavis
from model.checkpoints.loaded import LoadedParts
from model.checkpoints.records import read_json
from model.checkpoints.save import save_generation_adapter, save_retrieval_adapter
from model.checkpoints.save_hub import save_hub
from model.errors import CheckpointError

PRETRAINED = Path(__file__).parent.parent / "pretrained"
EMBEDDED = {"tiny": PRETRAINED / "tiny" / "stage2", "tiny-t5": PRETRAINED / "tiny" / "stage2_t5"}


def load_blip2(name_or_path: str, *, dtype: torch.dtype, image_size: int | None = None) -> LoadedParts:
    """Loads the checkpoint in a directory, of whichever format it is, or an embedded one by its name.

    On the CPU; the frozen parts in `dtype`, the rest in float32. image_size: of the images to read, to which
    the position table is interpolated; None: the checkpoint's. Raises CheckpointError where there is no such
    checkpoint, or it is damaged or of a kind that is not supported.
    """
    directory = EMBEDDED.get(name_or_path, Path(name_or_path))
    if directory.suffix == ".pth" and directory.is_file():
        return load_lavis(directory, dtype=dtype, image_size=image_size)
    if not directory.is_dir():
        raise CheckpointError(f"there is no checkpoint {name_or_path!r} ({directory}); give {_accepted()}")
    fields = read_json(directory / "config.json")
    if fields.get("format") == FORMAT:
        return load_adapter(directory, dtype=dtype, image_size=image_size)
    if fields.get("model_type") == "blip-2":
        return load_hub(directory, dtype=dtype, image_size=image_size)
    raise CheckpointError(f"{directory / 'config.json'} describes no BLIP-2 checkpoint; give {_accepted()}")


def _accepted() -> str:
    present = sorted(name for name, directory in EMBEDDED.items() if directory.is_dir())
    return (
        "a directory with an adapter or a model in the Hub's format, the .pth file of a model of LAVIS, or "
        f"one of {present}; ids of the Hub are not downloaded: fetch one with 'hf download'"
    )


__all__ = [
    "LoadedParts",
    "load_adapter",
    "load_blip2",
    "load_hub",
    "load_language_model",
    "load_lavis",
    "load_vision_model",
    "save_generation_adapter",
    "save_hub",
    "save_retrieval_adapter",
]
