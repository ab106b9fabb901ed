"""Writes checkpoints: the adapters that stage 1 and stage 2 leave behind, and the Hub's format."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import Blip2Config, Blip2ForConditionalGeneration

from model.checkpoints.adapter import ADAPTER, TIED_HEAD
from model.checkpoints.adapter_config import AdapterConfig, FrozenPart, ImageConfig
from model.checkpoints.frozen import FINAL_NORM, LANGUAGE, VISION
from model.checkpoints.query_branch import query_branch_tensors
from model.checkpoints.tensors import TensorFiles
from model.language import LanguageModel
from model.matching import Matcher
from model.parts import Blip2Parts
from model.preprocess import ImagePreprocessor


def save_generation_adapter(
    directory: Path,
    parts: Blip2Parts,
    *,
    vision_directory: Path,
    language_directory: Path,
    retrieval_directory: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes what stage 2 trained: config.json and adapter.safetensors, its tensors cast to `dtype`.

    The other directories hold the frozen parts (`save_pretrained`) and the stage-1 adapter; they are named
    relative to `directory`, so the tree can be moved as a whole. A reader never sees half a file.
    """
    config = AdapterConfig(
        kind="generation",
        vision_model=_frozen_part(vision_directory, directory),
        language_model=_frozen_part(language_directory, directory),
        qformer=parts.qformer.config,
        image=_image_config(parts.preprocess),
        prompts=parts.prompts,
        retrieval_model=None if retrieval_directory is None else _relative(retrieval_directory, directory),
        feature_layer=parts.vision_model.feature_layer,
    )
    with _replacing(directory) as staging:
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

    feature_layer: that of the vision encoder in use.
    """
    config = AdapterConfig(
        kind="retrieval",
        vision_model=_frozen_part(vision_directory, directory),
        qformer=matcher.config,
        image=_image_config(preprocess),
        max_text_tokens=matcher.max_text_tokens,
        feature_layer=feature_layer,
    )
    tensors = matcher.state_dict()
    tensors.pop(TIED_HEAD, None)
    with _replacing(directory) as staging:
        matcher.tokenizer.save_pretrained(staging)
        _save_tensors(tensors, staging, dtype)
        config.write(staging / "config.json")


def save_hub(directory: Path, parts: Blip2Parts) -> None:
    """Writes a generation model in the Hub's format, for `Blip2ForConditionalGeneration.from_pretrained`.

    With the tokenizer and a preprocessor_config.json. What the format has no place for, the retrieval side
    and the prompts, is left out.
    """
    assert parts.language_model is not None, "the Hub's generation format needs a language model"
    llm = parts.language_model.llm
    tensors = query_branch_tensors(parts)
    renamed = {name.replace("ln_vision.", VISION + FINAL_NORM): tensor for name, tensor in tensors.items()}
    tower = {VISION + name: tensor for name, tensor in parts.vision_model.tower.state_dict().items()}
    language = {LANGUAGE + name: tensor for name, tensor in llm.state_dict().items()}
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(_hub_config(parts, parts.language_model))
    model.load_state_dict(renamed | tower | language, assign=True)
    model.language_model = llm  # whose head stays its own where it is
    model.save_pretrained(directory)
    parts.language_model.tokenizer.save_pretrained(directory)
    _write_preprocessor_config(parts.preprocess, directory / "preprocessor_config.json")


def _hub_config(parts: Blip2Parts, language_model: LanguageModel) -> Blip2Config:
    qformer = dataclasses.asdict(parts.qformer.config)
    num_query_tokens, joint_size = qformer.pop("num_query_tokens"), qformer.pop("joint_size")
    return Blip2Config(
        vision_config=parts.vision_model.tower.config.to_dict(),
        qformer_config=qformer,
        text_config=language_model.llm.config.to_dict(),
        num_query_tokens=num_query_tokens,
        image_text_hidden_size=joint_size,
        image_token_index=language_model.image_token_id,
    )


def _write_preprocessor_config(preprocess: ImagePreprocessor, path: Path) -> None:
    fields = {
        "image_processor_type": "BlipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"height": preprocess.image_size, "width": preprocess.image_size},
        "resample": int(Image.Resampling.BICUBIC),
        "rescale_factor": 1 / 255,
        "image_mean": preprocess.mean,
        "image_std": preprocess.std,
    }
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


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
