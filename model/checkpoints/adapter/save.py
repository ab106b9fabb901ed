"""Writes adapters: what stage 1 and stage 2 leave behind."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoints.adapter.config import AdapterConfig, FrozenPart, ImageConfig
from model.checkpoints.adapter.load import ADAPTER, TIED_HEAD
from model.checkpoints.qformer_branch import query_branch_tensors
from model.checkpoints.tensors import TensorFiles
from model.components import Blip2Parts
from model.matching import MAX_TEXT_TOKENS, Matcher
from model.preprocess import ImagePreprocessor


def save_generation_adapter(
    directory: Path,
    parts: Blip2Parts,
    *,
    vision_directory: Path,
    language_directory: Path,
    retrieval_directory: Path | None = None,
    feature_layer: int = -1,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes what stage 2 trained: config.json and adapter.safetensors, its tensors cast to `dtype`.

    The other directories hold the frozen parts (`save_pretrained`) and the stage-1 adapter; they are named
    relative to `directory`, so the tree can be moved as a whole. feature_layer: whose output is read, of the
    encoder in `vision_directory` (see `model.vision.VisionEncoder`). A reader never sees half a file.
    """
    reader = parts.question_reader
    config = AdapterConfig(
        kind="generation",
        vision_model=_frozen_part(vision_directory, directory),
        language_model=_frozen_part(language_directory, directory),
        qformer=parts.qformer.config,
        image=_image_config(parts.preprocess),
        prompts=parts.prompts,
        retrieval_model=None if retrieval_directory is None else _relative(retrieval_directory, directory),
        feature_layer=feature_layer,
        question_conditioned=reader is not None,
        max_text_tokens=MAX_TEXT_TOKENS if reader is None else reader.max_text_tokens,
    )
    with _replacing(directory) as staging:
        if reader is not None:
            reader.tokenizer.save_pretrained(staging)
        _save_tensors(query_branch_tensors(parts), staging, dtype)
        config.write(staging / "config.json")


def save_retrieval_adapter(
    directory: Path,
    matcher: Matcher,
    preprocess: ImagePreprocessor,
    *,
    vision_directory: Path,
    feature_layer: int = -1,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes what stage 1 trained: config.json, adapter.safetensors and the text side's tokenizer.

    feature_layer: as in `save_generation_adapter`.
    """
    config = AdapterConfig(
        kind="retrieval",
        vision_model=_frozen_part(vision_directory, directory),
        qformer=matcher.config,
        image=_image_config(preprocess),
        max_text_tokens=matcher.max_text_tokens,
        has_text_head=matcher.text_head is not None,
        feature_layer=feature_layer,
    )
    tensors = matcher.state_dict()
    tensors.pop(TIED_HEAD, None)
    with _replacing(directory) as staging:
        matcher.tokenizer.save_pretrained(staging)
        _save_tensors(tensors, staging, dtype)
        config.write(staging / "config.json")


def _frozen_part(part_directory: Path, directory: Path) -> FrozenPart:
    return FrozenPart(_relative(part_directory, directory), TensorFiles(part_directory).sha256())


def _relative(path: Path, directory: Path) -> str:
    return Path(os.path.relpath(path, directory)).as_posix()


def _image_config(preprocess: ImagePreprocessor) -> ImageConfig:
    return ImageConfig(preprocess.image_size, preprocess.mean, preprocess.std)


def _save_tensors(tensors: Mapping[str, Tensor], directory: Path, dtype: torch.dtype) -> None:
    cast = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(cast, directory / ADAPTER, metadata={"format": "pt"})


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """Lends a folder; what was written there then takes its place in `directory`, config.json last."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as folder:
        staging = Path(folder)
        yield staging
        for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.replace(directory / path.name)
