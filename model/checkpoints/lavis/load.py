"""LAVIS' format: a .pth file that holds what was trained, and often not the frozen parts.

Beside <name>.pth stands <name>.json, which says what the file alone does not:

    arch            "blip2" (stage 1: retrieval), "blip2_opt" or "blip2_t5" (stage 2: generation)
    image_size      of the images to read, in pixels
    vision_model    "eva_clip_g" or "clip_L", whose weights the .pth then holds; or an encoder's directory
    language_model  the directory of an OPT or T5 with its tokenizer; its weights unless the .pth holds them
    tokenizer       the directory of BERT's tokenizer with "[DEC]" as its bos token; of "blip2"
    num_attention_heads  of the Q-Former; BERT's heads, 64 wide, unless given

Directories are relative to the .json. A directory may be a whole checkpoint in the Hub's format, of which the
part that is needed is read.
"""

import copy
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal
from zipfile import is_zipfile

import torch
from torch import Tensor
from transformers import Blip2VisionConfig, CLIPVisionConfig, PreTrainedConfig

from model.checkpoints.adapter.load import TIED_HEAD
from model.checkpoints.frozen.vision_model import (
    IN_FLOAT32,
    LANGUAGE,
    VISION,
    assemble_vision_model,
    load_language_model,
    load_text_tokenizer,
    load_vision_model,
    read_vision_config,
    resize_vision_model,
)
from model.checkpoints.json_records import build_record, read_json
from model.checkpoints.lavis.tensor_names import find_family, from_lavis
from model.checkpoints.load_options import LoadOptions
from model.checkpoints.loaded_checkpoint import LoadedParts, Source
from model.checkpoints.qformer_branch import build_generation_parts, build_retrieval_parts
from model.checkpoints.tensors import MemoryTensors, hash_file, load_strictly
from model.components import Blip2Parts
from model.config import QFormerConfig
from model.errors import CheckpointError
from model.matching import Matcher
from model.preprocess import ImagePreprocessor
from model.vision import FAMILIES, VisionEncoder

_BERT_HEAD_SIZE = 64
ENCODERS: Mapping[str, PreTrainedConfig] = {
    "eva_clip_g": Blip2VisionConfig(
        hidden_size=1408,
        intermediate_size=6144,
        num_hidden_layers=39,
        num_attention_heads=16,
        patch_size=14,
        layer_norm_eps=1e-6,
    ),
    "clip_L": CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        patch_size=14,
        layer_norm_eps=1e-5,
    ),
}


@dataclass(frozen=True, slots=True)
class LavisConfig:
    """What <name>.json says; see above."""

    arch: Literal["blip2", "blip2_opt", "blip2_t5"]
    image_size: int
    vision_model: str
    language_model: str | None = None
    tokenizer: str | None = None
    num_attention_heads: int | None = None

    @classmethod
    def read(cls, path: Path) -> "LavisConfig":
        """Raises CheckpointError naming the key that is unknown, missing or wrong."""
        config = build_record(cls, read_json(path), where=str(path))
        needed = "tokenizer" if config.arch == "blip2" else "language_model"
        if getattr(config, needed) is None:
            raise CheckpointError(f"{path}: {config.arch!r} needs a {needed!r}, the directory of one")
        return config


def load_lavis(path: Path, options: LoadOptions = IN_FLOAT32) -> LoadedParts:
    """Loads a .pth file and what its .json names.

    Raises CheckpointError where a file is
    absent, damaged or of another model, and where the .pth holds anything but tensors.
    """
    description = path.with_suffix(".json")
    config = LavisConfig.read(description)
    theirs = read_pickle(path)
    _check_arch(config, find_family(theirs), path)
    tensors = MemoryTensors(from_lavis(theirs, source=path), path)
    options = replace(options, image_size=options.image_size or config.image_size)
    vision_model = _load_vision_model(config, tensors, options)
    build = _build_retrieval_parts if config.arch == "blip2" else _build_generation_parts
    parts = build(config, tensors, vision_model, options)
    sources = (
        partial(hash_file, path),
        description.read_text(encoding="utf-8"),
        *_named_sources(config, path),
    )
    return LoadedParts(parts, sources)


def _check_arch(config: LavisConfig, family: str | None, path: Path) -> None:
    found = "blip2" if family is None else f"blip2_{family}"
    if found != config.arch:
        raise CheckpointError(
            f"{path.with_suffix('.json')}: arch is {config.arch!r}, the tensors of {path} are those of "
            f"{found!r}; correct the one or the other"
        )


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a .pth file; never runs what else a pickle may hold. Raises CheckpointError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path} ({error}); it was cut or damaged: copy it again"
        ) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and would run code when it is read, so it is refused; save its "
            "state dict alone, with torch.save(model.state_dict(), path)"
        ) from error
    tensors = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(each, Tensor) for each in tensors.values()):
        raise CheckpointError(f"{path} holds no state dict, neither itself nor as 'model'; save it again")
    return tensors


def _load_vision_model(config: LavisConfig, tensors: MemoryTensors, options: LoadOptions) -> VisionEncoder:
    directory = tensors.path.parent / config.vision_model
    if not tensors.has(VISION):
        if config.vision_model in ENCODERS:
            raise CheckpointError(
                f"{tensors.path} holds no image encoder (visual_encoder.*); name the directory of one as "
                f"'vision_model' in {tensors.path.with_suffix('.json')}, it says {config.vision_model!r}"
            )
        return load_vision_model(directory, options)
    named = ENCODERS.get(config.vision_model)
    vision_config = read_vision_config(directory) if named is None else copy.deepcopy(named)
    dtype = options.pick_dtype(FAMILIES[vision_config.model_type].half)
    own = tensors.read(VISION, dtype=dtype, device=options.device)
    vision_config.image_size = _trained_image_size(own, vision_config)
    encoder = assemble_vision_model(vision_config, own, source=tensors.path)
    return resize_vision_model(encoder, options.image_size, source=tensors.path).to(options.device)


def _trained_image_size(tensors: Mapping[str, Tensor], config: PreTrainedConfig) -> int:
    """The size of the images that the position table in a file was made for."""
    table = next((each for name, each in tensors.items() if "position_embedding" in name), None)  # [.., P, V]
    if table is None:
        raise CheckpointError("the image encoder in the .pth file has no position embeddings; save it again")
    rows: int = math.isqrt(table.shape[-2] - 1)
    patch_size: int = config.patch_size
    return rows * patch_size


def _build_generation_parts(
    config: LavisConfig, tensors: MemoryTensors, vision_model: VisionEncoder, options: LoadOptions
) -> Blip2Parts:
    assert config.language_model is not None, "the configuration was checked when it was read"
    language_model = load_language_model(
        tensors.path.parent / config.language_model,
        options,
        tensors=tensors if tensors.has(LANGUAGE) else None,
    )
    if (found := language_model.llm.config.model_type) != config.arch.removeprefix("blip2_"):
        raise CheckpointError(
            f"{tensors.path.with_suffix('.json')}: arch is {config.arch!r}, and 'language_model' is of type "
            f"{found!r}; name the one it was trained with"
        )
    own = tensors.read(skip=(VISION, LANGUAGE), dtype=torch.float32, device=options.device)
    return build_generation_parts(
        _qformer_config(config, own, vision_model, tensors.path),
        own,
        vision_model,
        language_model,
        preprocess=ImagePreprocessor(vision_model.image_size),
        source=tensors.path,
    )


def _build_retrieval_parts(
    config: LavisConfig, tensors: MemoryTensors, vision_model: VisionEncoder, options: LoadOptions
) -> Blip2Parts:
    assert config.tokenizer is not None, "the configuration was checked when it was read"
    own = tensors.read(skip=(VISION,), dtype=torch.float32, device=options.device)
    with torch.device("meta"):
        matcher = Matcher(
            _qformer_config(config, own, vision_model, tensors.path),
            load_text_tokenizer(tensors.path.parent / config.tokenizer),
            vision_layer_norm_eps=vision_model.layer_norm_eps,
        )
    if not any(name.startswith("text_head.") for name in own):  # converted from the Hub's format
        matcher.text_head = None
    head = own.pop(TIED_HEAD, None)
    if head is not None and not torch.equal(head, own.get("embeddings.word_embeddings.weight", head)):
        raise CheckpointError(
            f"{tensors.path}: the output matrix of the text head differs from the word embeddings, and is "
            "tied to them in BLIP-2; save it again"
        )
    load_strictly(matcher, own, source=tensors.path, tied=[TIED_HEAD])
    matcher.tie_text_head()
    return build_retrieval_parts(matcher, vision_model, ImagePreprocessor(vision_model.image_size))


def _qformer_config(
    config: LavisConfig, tensors: Mapping[str, Tensor], vision_model: VisionEncoder, path: Path
) -> QFormerConfig:
    """Reads the sizes of a Q-Former off its tensors; LAVIS' has BERT's heads, dropout and epsilon."""
    try:
        _, num_query_tokens, hidden_size = tensors["query_tokens"].shape
        intermediate_size = len(tensors["qformer.encoder.layer.0.intermediate_query.dense.weight"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} holds no Q-Former ({error} is not there); give a .pth file that BLIP-2 of LAVIS saved"
        ) from error
    depth = 1 + max(int(name.split(".")[3]) for name in tensors if name.startswith("qformer.encoder.layer."))
    words = tensors.get("embeddings.word_embeddings.weight", torch.empty(30523, 0))
    positions = tensors.get("embeddings.position_embeddings.weight", torch.empty(512, 0))
    joint = tensors.get("text_projection.weight", torch.empty(256, 0))
    try:
        return QFormerConfig(
            hidden_size=hidden_size,
            num_hidden_layers=depth,
            num_attention_heads=config.num_attention_heads or max(1, hidden_size // _BERT_HEAD_SIZE),
            intermediate_size=intermediate_size,
            encoder_hidden_size=vision_model.hidden_size,
            num_query_tokens=num_query_tokens,
            vocab_size=len(words),
            max_position_embeddings=len(positions),
            joint_size=len(joint),
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _named_sources(config: LavisConfig, path: Path) -> tuple[Source, ...]:
    """Gives what identifies the directories that a .json names: hashes of weights, text of configurations."""
    found: list[Source] = []
    for name in (config.vision_model, config.language_model):
        files = sorted((path.parent / name).glob("model*.safetensors")) if name else []
        found += [partial(hash_file, file) for file in files]
        if name and (configuration := path.parent / name / "config.json").is_file():
            found.append(configuration.read_text(encoding="utf-8"))
    return tuple(found)
