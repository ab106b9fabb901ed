"""Loads a frozen image encoder, from a directory as `save_pretrained` writes it."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import Blip2Config, CLIPConfig, PreTrainedConfig, PreTrainedModel, SiglipConfig

from model.checkpoints.foreign_tensors import check_merged
from model.checkpoints.frozen.transformers_loading import build_config, freeze, silence_transformers
from model.checkpoints.json_records import read_json
from model.checkpoints.load_options import IN_FLOAT32, LoadOptions
from model.checkpoints.strict_loading import (
    BUILD_ERRORS,
    build_on_meta,
    check_num_parameters,
    load_strictly,
    report_build_errors,
)
from model.checkpoints.tensors import TensorFiles, TensorSource
from model.errors import CheckpointError
from model.vision import FAMILIES, VisionEncoder, VisionFamily, build_vision_encoder

BLIP2_VISION = "blip_2_vision_model"
VISION_PREFIX = "vision_model."
FINAL_NORM_PREFIX = "post_layernorm."
_WHOLE_MODELS: Mapping[str, type[PreTrainedConfig]] = {
    "blip-2": Blip2Config,
    "clip": CLIPConfig,
    "siglip": SiglipConfig,
}


def load_vision_model(
    directory: Path,
    options: LoadOptions = IN_FLOAT32,
    *,
    feature_layer: int = -1,
    attn_implementation: str = "sdpa",
    tensors: TensorSource | None = None,
) -> VisionEncoder:
    """Load an image encoder of one of `model.vision.FAMILIES`, frozen.

    Of a directory with a whole CLIP, SigLIP or BLIP-2, its image encoder. A final norm and poolers are
    ignored. feature_layer: see `VisionEncoder`. tensors: of a BLIP-2, unless they are in the directory.
    Raises CheckpointError where a file is absent, damaged or of another model, or the size does not fit.
    """
    config = read_vision_config(directory)
    vision_family = FAMILIES[config.model_type]
    dtype = options.pick_dtype(vision_family.half)
    if config.model_type == BLIP2_VISION:
        files = tensors or TensorFiles(directory)
        is_inside_blip2 = read_json(directory / "config.json").get("model_type") == Blip2Config.model_type
        prefix = VISION_PREFIX if is_inside_blip2 else ""
        encoder = assemble_vision_model(
            config,
            files.read(prefix, skip=(prefix + FINAL_NORM_PREFIX,), dtype=dtype, device=options.device),
            source=files.path,
            feature_layer=feature_layer,
            attn_implementation=attn_implementation,
        )
    else:
        vit = _load_vit(config, directory, dtype, attn_implementation)
        encoder = freeze(_build_encoder(vit, feature_layer, source=directory))
    return resize_vision_model(encoder, options.image_size, source=directory).to(options.device)


def read_vision_config(directory: Path) -> PreTrainedConfig:
    """Read the configuration of the image encoder in a directory, or of that inside a whole model.

    Raises CheckpointError where there is none of a supported kind.
    """
    check_merged(directory)
    path = directory / "config.json"
    fields = read_json(path)
    model_type = str(fields.get("model_type"))
    if model_type in _WHOLE_MODELS:
        whole_config = build_config(_WHOLE_MODELS[model_type], path, fields)
        config: PreTrainedConfig = whole_config.vision_config
        model_type = str(config.model_type)
        if model_type in FAMILIES:
            return config
    elif model_type in FAMILIES:
        return build_config(FAMILIES[model_type].vit_class.config_class, path, fields)
    raise CheckpointError(
        f"{path} is of model type {model_type!r}; image encoders of "
        f"{sorted([*FAMILIES, *_WHOLE_MODELS])} can be loaded"
    )


def assemble_vision_model(
    config: PreTrainedConfig,
    tensors: Mapping[str, Tensor],
    *,
    source: Path,
    feature_layer: int = -1,
    attn_implementation: str = "sdpa",
) -> VisionEncoder:
    """Build an encoder around its tensors, without initialising weights that would be overwritten."""
    with build_on_meta(source):
        encoder = build_vision_encoder(config, attn_implementation=attn_implementation)
    load_strictly(encoder.backbone, tensors, source=source)
    with report_build_errors(source):
        encoder.compute_buffers()
    return freeze(_build_encoder(encoder.vit, feature_layer, source=source))


def resize_vision_model(encoder: VisionEncoder, image_size: int | None, *, source: Path) -> VisionEncoder:
    """Change the image size of an encoder unless it is None, and return it. Raises CheckpointError."""
    try:
        encoder.resize(image_size or encoder.image_size)
    except ValueError as error:
        raise CheckpointError(f"the image encoder of {source} cannot be resized: {error}") from error
    return encoder


def _build_encoder(vit: PreTrainedModel, feature_layer: int, *, source: Path) -> VisionEncoder:
    try:
        return VisionEncoder(vit, feature_layer=feature_layer)
    except ValueError as error:
        raise CheckpointError(f"the image encoder of {source}: {error}; correct 'feature_layer'") from error


def _load_vit(
    config: PreTrainedConfig, directory: Path, dtype: torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    """Load an encoder by transformers, which has renamed its tensors from release to release."""
    vision_family = FAMILIES[config.model_type]
    headers = TensorFiles(directory).headers()
    with build_on_meta(directory):
        empty = vision_family.vit_class(config)
    check_num_parameters(empty, sum(each.num_parameters for each in headers), source=directory)
    if "transformers_weights" in read_json(directory / "config.json"):
        raise CheckpointError(
            f"{directory / 'config.json'} names other weights as 'transformers_weights'; remove the key"
        )
    try:
        with silence_transformers():  # else it lists the text encoder of a pair, tensor by tensor
            vit, loading_info = vision_family.vit_class.from_pretrained(
                directory,
                dtype=dtype,
                attn_implementation=attn_implementation,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, *BUILD_ERRORS) as error:
        raise CheckpointError(
            f"{directory} holds no image encoder that can be read ({error}); save it again"
        ) from error
    if unexpected := sorted(name for name in loading_info["unexpected_keys"] if _is_image_layer(name)):
        raise CheckpointError(
            f"{directory} holds the tensor {unexpected[0]!r}, which its configuration has no place for "
            f"({len(unexpected)} in all); use the config.json saved with it"
        )
    if missing := sorted(
        name for name in loading_info["missing_keys"] if not _is_unused(name, vision_family)
    ):
        raise CheckpointError(
            f"{directory} lacks the tensor {missing[0]!r} of its image encoder "
            f"({len(missing)} are missing in all); save it again"
        )
    return vit


def _is_image_layer(name: str) -> bool:
    return re.search(r"\blayers?\.\d+\.", name) is not None and not name.startswith("text_model.")


def _is_unused(name: str, vision_family: VisionFamily) -> bool:
    """Return whether a tensor is never used: the final norm, poolers, the token of masked training."""
    return bool({vision_family.final_norm, "pooler", "head", "mask_token"} & set(name.split(".")))
