"""Saves adapters: the trained tensors of stage 1 or stage 2."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoints.adapter.config import AdapterConfig, FrozenModelRef, ImageConfig
from model.checkpoints.adapter.load import ADAPTER, TIED_HEAD
from model.checkpoints.qformer_branch import qformer_branch_tensors
from model.checkpoints.tensors import TensorFiles
from model.components import Blip2Components
from model.matching import MAX_TEXT_TOKENS, Matcher
from model.preprocess import ImagePreprocessor


def save_generation_adapter(
    directory: Path,
    components: Blip2Components,
    *,
    vision_directory: Path,
    language_directory: Path,
    retrieval_directory: Path | None = None,
    feature_layer: int = -1,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Save the trained tensors of stage 2: config.json and adapter.safetensors, cast to `dtype`.

    The other directories hold the frozen models (`save_pretrained`) and the stage-1 adapter; they are named
    relative to `directory`, so the tree can be moved as a whole. feature_layer: of the encoder in
    `vision_directory`, see `model.vision.VisionEncoder`. Files are replaced atomically.
    """
    embedder = components.question_embedder
    config = AdapterConfig(
        kind="generation",
        vision_model=_reference(vision_directory, directory),
        language_model=_reference(language_directory, directory),
        qformer=components.qformer.config,
        image=_image_config(components.preprocess),
        prompts=components.prompts,
        retrieval_model=None if retrieval_directory is None else _relative(retrieval_directory, directory),
        feature_layer=feature_layer,
        question_conditioned=embedder is not None,
        max_text_tokens=MAX_TEXT_TOKENS if embedder is None else embedder.max_text_tokens,
    )
    with _staging_directory(directory) as staging:
        if embedder is not None:
            embedder.tokenizer.save_pretrained(staging)
        _save_tensors(qformer_branch_tensors(components), staging, dtype)
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
    """Save the trained tensors of stage 1: config.json, adapter.safetensors and the texts' tokenizer.

    feature_layer: as in `save_generation_adapter`.
    """
    config = AdapterConfig(
        kind="retrieval",
        vision_model=_reference(vision_directory, directory),
        qformer=matcher.config,
        image=_image_config(preprocess),
        max_text_tokens=matcher.max_text_tokens,
        has_text_head=matcher.text_head is not None,
        feature_layer=feature_layer,
    )
    tensors = matcher.state_dict()
    tensors.pop(TIED_HEAD, None)
    with _staging_directory(directory) as staging:
        matcher.tokenizer.save_pretrained(staging)
        _save_tensors(tensors, staging, dtype)
        config.write(staging / "config.json")


def _reference(frozen_directory: Path, directory: Path) -> FrozenModelRef:
    return FrozenModelRef(_relative(frozen_directory, directory), TensorFiles(frozen_directory).sha256())


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
def _staging_directory(directory: Path) -> Iterator[Path]:
    """Yield a temporary folder, whose files then replace those in `directory`, config.json last."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as folder:
        staging = Path(folder)
        yield staging
        for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.replace(directory / path.name)
