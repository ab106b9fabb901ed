"""The frozen parts, each a directory as transformers' `save_pretrained` writes it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Blip2VisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from model.checkpoints.llm import find_format, load_llm
from model.checkpoints.tensors import TensorFiles, load_strictly, read_json
from model.errors import CheckpointError
from model.language import LanguageModel
from model.vision import FAMILIES, VisionEncoder, VisionFamily, build_vision_encoder

C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)

BLIP2_VISION = "blip_2_vision_model"
FINAL_NORM = "post_layernorm."
_TWO_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


def load_vision_model(
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    image_size: int | None = None,
    feature_layer: int = -1,
    attn_implementation: str = "sdpa",
) -> VisionEncoder:
    """Loads an image encoder of one of `model.vision.FAMILIES`, frozen, on the CPU.

    Of a CLIP or SigLIP directory that holds both towers, the image side. A final norm and poolers are left
    unread. image_size: to resize it to, unless None. feature_layer: see `VisionEncoder`.
    Raises CheckpointError where a file is absent, damaged or of another model, or the size does not fit.
    """
    path = directory / "config.json"
    fields: dict[str, Any] = read_json(path)
    model_type = str(fields.get("model_type"))
    if model_type == BLIP2_VISION:
        files = TensorFiles(directory)
        encoder = assemble_vision_model(
            build_config(Blip2VisionConfig, path, fields),
            files.read(skip=(FINAL_NORM,), dtype=dtype),
            source=files.path,
            feature_layer=feature_layer,
            attn_implementation=attn_implementation,
        )
    else:
        family = FAMILIES.get(_TWO_TOWERS.get(model_type, model_type))
        if family is None:
            raise CheckpointError(
                f"{path} is of model type {model_type!r}; image encoders of "
                f"{sorted([*FAMILIES, *_TWO_TOWERS])} can be loaded"
            )
        tower = _load_tower(family, directory, dtype, attn_implementation)
        encoder = freeze(VisionEncoder(tower, feature_layer=feature_layer))
    return resize_vision_model(encoder, image_size, source=path)


def assemble_vision_model(
    config: Blip2VisionConfig,
    tensors: Mapping[str, Tensor],
    *,
    source: Path,
    feature_layer: int = -1,
    attn_implementation: str = "sdpa",
) -> VisionEncoder:
    """Builds the encoder around the tensors of its tower; nothing is initialised only to be overwritten."""
    with torch.device("meta"):
        encoder = build_vision_encoder(config, attn_implementation=attn_implementation)
    load_strictly(encoder.tower, tensors, source=source)
    return freeze(VisionEncoder(encoder.tower, feature_layer=feature_layer))


def resize_vision_model(encoder: VisionEncoder, image_size: int | None, *, source: Path) -> VisionEncoder:
    """Gives the same encoder, for images of another size unless that is None. Raises CheckpointError."""
    try:
        encoder.resize(image_size or encoder.image_size)
    except ValueError as error:
        raise CheckpointError(f"the image encoder of {source} cannot be resized: {error}") from error
    return encoder


def _load_tower(
    family: VisionFamily, directory: Path, dtype: torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    """Lets transformers load a tower, whose tensors it has renamed from release to release."""
    TensorFiles(directory)  # whose errors say more
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else it lists the other tower of a pair, tensor by tensor
    try:
        tower, found = family.tower_class.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{directory} holds no image encoder that can be read ({error}); save it again"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(name for name in found["missing_keys"] if not _is_unread(name, family)):
        raise CheckpointError(
            f"{directory} lacks the tensor {missing[0]!r} of its image encoder "
            f"({len(missing)} are missing in all); save it again"
        )
    return tower


def _is_unread(name: str, family: VisionFamily) -> bool:
    """Whether nothing here reads a tensor: the final norm, poolers, and the token of masked training."""
    parts = name.split(".")
    return bool({family.final_norm, "pooler", "head", "mask_token"} & set(parts))


def load_language_model(directory: Path, *, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Loads an OPTForCausalLM or T5ForConditionalGeneration directory with its tokenizer, frozen, on the CPU.

    Raises CheckpointError where a file is absent, damaged or of another model, and for a T5 in float16.
    """
    path = directory / "config.json"
    fields = read_json(path)
    config = build_config(find_format(fields.get("model_type"), path).config_class, path, fields)
    has_own_head = fields.get("tie_word_embeddings") is False
    llm = load_llm(config, TensorFiles(directory), path=path, dtype=dtype, has_own_head=has_own_head)
    return freeze(LanguageModel(llm, load_tokenizer(directory)))


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a directory; never from the network."""
    try:
        if (directory / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{directory} holds no tokenizer that can be read ({error}); put tokenizer.json and "
            "tokenizer_config.json there"
        ) from error


def build_config(config_class: type[C], path: Path, fields: Mapping[str, Any]) -> C:
    """Builds a transformers configuration. Raises CheckpointError where the file is of another model."""
    expected = getattr(config_class, "model_type", None)
    if (found := fields.get("model_type")) != expected:
        raise CheckpointError(f"{path} is of model type {found!r}, {expected!r} is needed here")
    try:
        return config_class.from_dict(dict(fields))  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a valid configuration ({error})") from error


def freeze(module: M) -> M:
    """Puts a module into evaluation mode, without gradients of its weights."""
    return module.requires_grad_(False).eval()
