"""The frozen parts, each a directory as transformers' `save_pretrained` writes it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Blip2Config,
    CLIPConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
)

from model.checkpoints.frozen.llm import find_llm_config, load_llm
from model.checkpoints.frozen.placement import place_llm
from model.checkpoints.frozen.transformers_loading import quiet
from model.checkpoints.json_records import naming, read_json
from model.checkpoints.load_options import LoadOptions
from model.checkpoints.tensors import TensorFiles, TensorSource, load_strictly
from model.errors import CheckpointError, UnfitLanguageModelError
from model.language import LanguageModel
from model.vision import FAMILIES, VisionEncoder, VisionFamily, build_empty_encoder

C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)

IN_FLOAT32 = LoadOptions()
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
BLIP2_VISION = "blip_2_vision_model"
FINAL_NORM = "post_layernorm."
VISION = "vision_model."
LANGUAGE = "language_model."
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
) -> VisionEncoder:
    """Loads an image encoder of one of `model.vision.FAMILIES`, frozen.

    Of a directory with a whole CLIP, SigLIP or BLIP-2, its image side. A final norm and poolers are left
    unread. feature_layer: see `VisionEncoder`.
    Raises CheckpointError where a file is absent, damaged or of another model, or the size does not fit.
    """
    config = read_vision_config(directory)
    family = FAMILIES[config.model_type]
    if config.model_type == BLIP2_VISION:
        files = TensorFiles(directory)
        is_inside = read_json(directory / "config.json").get("model_type") == Blip2Config.model_type
        prefix = VISION if is_inside else ""
        encoder = assemble_vision_model(
            config,
            files.read(
                prefix,
                skip=(prefix + FINAL_NORM,),
                dtype=options.pick_dtype(family.half),
                device=options.device,
            ),
            source=files.path,
            feature_layer=feature_layer,
            attn_implementation=attn_implementation,
        )
    else:
        tower = _load_tower(family, directory, options.pick_dtype(family.half), attn_implementation)
        encoder = freeze(_cut(tower, feature_layer, source=directory))
    return resize_vision_model(encoder, options.image_size, source=directory).to(options.device)


def read_vision_config(directory: Path) -> PreTrainedConfig:
    """Reads the configuration of the image encoder in a directory, or of the one inside its model.

    Raises CheckpointError where there is none of a kind that can be loaded.
    """
    path = directory / "config.json"
    fields = read_json(path)
    model_type = fields.get("model_type")
    if model_type in _WHOLE_MODELS:
        whole = build_config(_WHOLE_MODELS[str(model_type)], path, fields)
        config: PreTrainedConfig = whole.vision_config
        return config
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"{path} is of model type {model_type!r}; image encoders of "
            f"{sorted([*FAMILIES, *_WHOLE_MODELS])} can be loaded"
        )
    return build_config(FAMILIES[str(model_type)].tower_class.config_class, path, fields)


def assemble_vision_model(
    config: PreTrainedConfig,
    tensors: Mapping[str, Tensor],
    *,
    source: Path,
    feature_layer: int = -1,
    attn_implementation: str = "sdpa",
) -> VisionEncoder:
    """Builds the encoder around the tensors of its tower; nothing is initialised only to be overwritten."""
    with naming(source):
        encoder = build_empty_encoder(config, attn_implementation=attn_implementation)
    load_strictly(encoder.body, tensors, source=source)
    return freeze(_cut(encoder.tower, feature_layer, source=source))


def _cut(tower: PreTrainedModel, feature_layer: int, *, source: Path) -> VisionEncoder:
    try:
        return VisionEncoder(tower, feature_layer=feature_layer)
    except ValueError as error:
        raise CheckpointError(f"the image encoder of {source}: {error}; correct 'feature_layer'") from error


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
    if "transformers_weights" in read_json(directory / "config.json"):
        raise CheckpointError(
            f"{directory / 'config.json'} names other weights as 'transformers_weights'; remove the key"
        )
    try:
        with quiet():  # else it lists the other tower of a pair, tensor by tensor
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
    if unread := sorted(name for name in found["unexpected_keys"] if _is_layer_of_images(name)):
        raise CheckpointError(
            f"{directory} holds the tensor {unread[0]!r}, which its configuration has no place for "
            f"({len(unread)} in all); use the config.json saved with it"
        )
    if missing := sorted(name for name in found["missing_keys"] if not _is_unread(name, family)):
        raise CheckpointError(
            f"{directory} lacks the tensor {missing[0]!r} of its image encoder "
            f"({len(missing)} are missing in all); save it again"
        )
    return tower


def _is_layer_of_images(name: str) -> bool:
    return re.search(r"\blayers?\.\d+\.", name) is not None and not name.startswith("text_model.")


def _is_unread(name: str, family: VisionFamily) -> bool:
    """Whether nothing here reads a tensor: the final norm, poolers, and the token of masked training."""
    parts = name.split(".")
    return bool({family.final_norm, "pooler", "head", "mask_token"} & set(parts))


def load_language_model(
    directory: Path, options: LoadOptions = IN_FLOAT32, *, tensors: TensorSource | None = None
) -> LanguageModel:
    """Loads a directory with a language model and its tokenizer, frozen; or that of a whole BLIP-2.

    tensors: its weights, as "language_model.*", where not those of the directory.
    Raises CheckpointError where a file is absent, damaged or of another model, and for a T5 in float16.
    """
    path = directory / "config.json"
    fields: dict[str, Any] = read_json(path)
    is_inside = fields.get("model_type") == Blip2Config.model_type
    image_token_id = None
    if is_inside:
        whole = build_config(Blip2Config, path, fields)
        config, image_token_id = whole.text_config, whole.image_token_index
        find_llm_config(config.model_type, path)
        fields = fields.get("text_config") or {}
    else:
        config = build_config(find_llm_config(fields.get("model_type"), path), path, fields)
    llm = load_llm(
        config,
        tensors or TensorFiles(directory),
        path=path,
        options=options,
        prefix=LANGUAGE if is_inside or tensors is not None else "",
        has_own_head=fields.get("tie_word_embeddings") is False,
    )
    tokenizer = load_tokenizer(directory)
    if not is_inside:  # transformers' BLIP-2 goes by the configuration inside it alone
        _read_end_tokens(llm, directory / "generation_config.json")
    try:
        return LanguageModel(place_llm(freeze(llm), options), tokenizer, image_token_id=image_token_id).eval()
    except UnfitLanguageModelError as error:
        raise CheckpointError(f"the language model of {directory} {error}") from error


def _read_end_tokens(llm: PreTrainedModel, path: Path) -> None:
    """Takes the tokens that end an answer from the file that tells them, where there is one."""
    eos = read_json(path).get("eos_token_id") if path.is_file() else None
    if eos is not None and llm.generation_config is not None:
        llm.generation_config.eos_token_id = eos


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a directory; never from the network."""
    if not any((directory / name).is_file() for name in _VOCABULARIES):
        raise CheckpointError(  # for transformers would make one without words, and say nothing
            f"{directory} holds no tokenizer ({', '.join(_VOCABULARIES)}); put that of this checkpoint there"
        )
    try:
        if (directory / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library in Rust raises no other type
        raise CheckpointError(
            f"{directory} holds no tokenizer that can be read ({error}); put tokenizer.json and "
            "tokenizer_config.json there"
        ) from error


def load_text_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a Q-Former's text side. Raises CheckpointError where it frames no texts."""
    tokenizer = load_tokenizer(directory)
    for name in ("cls_token", "sep_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise CheckpointError(
                f"the tokenizer of {directory} has no {name!r}; put that of BERT there, "
                "with [DEC] as its bos token"
            )
    return tokenizer


def build_config(config_class: type[C], path: Path, fields: Mapping[str, Any]) -> C:
    """Builds a transformers configuration. Raises CheckpointError where the file is of another model."""
    expected = getattr(config_class, "model_type", None)
    if (found := fields.get("model_type")) != expected:
        raise CheckpointError(f"{path} is of model type {found!r}, {expected!r} is needed here")
    try:
        return config_class.from_dict(dict(fields))  # type: ignore[attr-defined]
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"{path} is not a valid configuration ({error})") from error


def freeze(module: M) -> M:
    """Puts a module into evaluation mode, without gradients of its weights."""
    return module.requires_grad_(False).eval()
