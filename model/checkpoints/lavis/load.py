"""Loads LAVIS' format: a .pth file with the trained tensors, and often without the frozen models.

Its <name>.json is described in `model.checkpoints.lavis.config`.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from model.checkpoints.adapter import TIED_HEAD
from model.checkpoints.frozen import (
    LANGUAGE_PREFIX,
    VISION_PREFIX,
    assemble_vision_model,
    load_language_model,
    load_text_tokenizer,
    load_vision_model,
    read_vision_config,
    resize_vision_model,
)
from model.checkpoints.hashing import hash_file
from model.checkpoints.lavis.config import ENCODERS, LavisConfig
from model.checkpoints.lavis.language_model import trained_fields
from model.checkpoints.lavis.pickled_tensors import read_pickle
from model.checkpoints.lavis.tensor_names import find_language_family, from_lavis
from model.checkpoints.load_options import IN_FLOAT32, LoadOptions
from model.checkpoints.loaded_checkpoint import LoadedCheckpoint, Source
from model.checkpoints.qformer_branch import build_generation_components, build_retrieval_components
from model.checkpoints.strict_loading import build_on_meta, load_strictly
from model.checkpoints.tensors import MemoryTensors
from model.components import Blip2Components
from model.config import QFormerConfig
from model.errors import CheckpointError
from model.matching import Matcher
from model.preprocess import ImagePreprocessor
from model.vision import FAMILIES, VisionEncoder

_BERT_HEAD_SIZE = 64
_FIRST_FFN = "qformer.encoder.layer.0.intermediate_query.dense.weight"


def load_lavis(path: Path, options: LoadOptions = IN_FLOAT32) -> LoadedCheckpoint:
    """Load a .pth file and the directories that its .json names.

    Raises CheckpointError where a file is absent, damaged or of another model, and where the .pth holds
    anything but tensors.
    """
    description = path.with_suffix(".json")
    config = LavisConfig.read(description)
    lavis_tensors = read_pickle(path)
    _check_arch(config, find_language_family(lavis_tensors), path)
    tensors = MemoryTensors(from_lavis(lavis_tensors, source=path), path)
    options = replace(options, image_size=options.image_size or config.image_size)
    vision_model = _load_vision_model(config, tensors, options)
    build = _build_retrieval if config.arch == "blip2" else _build_generation
    components = build(config, tensors, vision_model, options)
    sources = (
        partial(hash_file, path),
        description.read_text(encoding="utf-8"),
        *_named_sources(config, path),
    )
    return LoadedCheckpoint(components, sources)


def _check_arch(config: LavisConfig, language_family: str | None, path: Path) -> None:
    found = "blip2" if language_family is None else f"blip2_{language_family}"
    if found != config.arch:
        raise CheckpointError(
            f"{path.with_suffix('.json')}: arch is {config.arch!r}, the tensors of {path} are those of "
            f"{found!r}; correct the one or the other"
        )


def _load_vision_model(config: LavisConfig, tensors: MemoryTensors, options: LoadOptions) -> VisionEncoder:
    directory = tensors.path.parent / config.vision_model
    if not tensors.has(VISION_PREFIX):
        if config.vision_model in ENCODERS:
            raise CheckpointError(
                f"{tensors.path} holds no image encoder (visual_encoder.*); name the directory of one as "
                f"'vision_model' in {tensors.path.with_suffix('.json')}, it says {config.vision_model!r}"
            )
        return load_vision_model(directory, options)
    named = ENCODERS.get(config.vision_model)
    vision_config = read_vision_config(directory) if named is None else copy.deepcopy(named)
    dtype = options.pick_dtype(FAMILIES[vision_config.model_type].half)
    vision_tensors = tensors.read(VISION_PREFIX, dtype=dtype, device=options.device)
    vision_config.image_size = _trained_image_size(vision_tensors, vision_config, source=tensors.path)
    encoder = assemble_vision_model(vision_config, vision_tensors, source=tensors.path)
    return resize_vision_model(encoder, options.image_size, source=tensors.path).to(options.device)


def _trained_image_size(tensors: Mapping[str, Tensor], config: PreTrainedConfig, *, source: Path) -> int:
    """Return the image size of the position embeddings in a file. Raises CheckpointError."""
    positions = next(
        (each for name, each in tensors.items() if "position_embedding" in name), None
    )  # [.., P, V]
    if positions is None:
        raise CheckpointError(f"{source}: its image encoder has no position embeddings; save it again")
    if positions.dim() < 2 or positions.shape[-2] < 2:
        raise CheckpointError(
            f"{source}: the position embeddings of its image encoder have shape {list(positions.shape)}; one "
            "row for the image and one for each of its patches are needed: save it again"
        )
    rows: int = math.isqrt(positions.shape[-2] - 1)
    patch_size: int = config.patch_size
    return rows * patch_size


def _build_generation(
    config: LavisConfig, tensors: MemoryTensors, vision_model: VisionEncoder, options: LoadOptions
) -> Blip2Components:
    assert config.language_model is not None, "the configuration was checked when it was read"
    language_model = load_language_model(
        tensors.path.parent / config.language_model,
        options,
        tensors=tensors if tensors.has(LANGUAGE_PREFIX) else None,
        trained_fields=partial(trained_fields, config),
    )
    if (found := language_model.llm.config.model_type) != config.arch.removeprefix("blip2_"):
        raise CheckpointError(
            f"{tensors.path.with_suffix('.json')}: arch is {config.arch!r}, and 'language_model' is of type "
            f"{found!r}; name the one it was trained with"
        )
    trained = tensors.read(skip=(VISION_PREFIX, LANGUAGE_PREFIX), dtype=torch.float32, device=options.device)
    return build_generation_components(
        _qformer_config(config, trained, vision_model, tensors.path),
        trained,
        vision_model,
        language_model,
        preprocess=ImagePreprocessor(vision_model.image_size),
        source=tensors.path,
    )


def _build_retrieval(
    config: LavisConfig, tensors: MemoryTensors, vision_model: VisionEncoder, options: LoadOptions
) -> Blip2Components:
    assert config.tokenizer is not None, "the configuration was checked when it was read"
    trained = tensors.read(skip=(VISION_PREFIX,), dtype=torch.float32, device=options.device)
    qformer_config = _qformer_config(config, trained, vision_model, tensors.path)
    tokenizer = load_text_tokenizer(tensors.path.parent / config.tokenizer, qformer_config.vocab_size)
    with build_on_meta(tensors.path):
        matcher = Matcher(qformer_config, tokenizer, vision_layer_norm_eps=vision_model.layer_norm_eps)
    if not any(name.startswith("text_head.") for name in trained):  # converted from the Hub's format
        matcher.text_head = None
    head = trained.pop(TIED_HEAD, None)
    if head is not None and not torch.equal(head, trained.get("embeddings.word_embeddings.weight", head)):
        raise CheckpointError(
            f"{tensors.path}: the output matrix of the text head differs from the word embeddings, and is "
            "tied to them in BLIP-2; save it again"
        )
    load_strictly(matcher, trained, source=tensors.path, tied=[TIED_HEAD])
    matcher.tie_text_head()
    return build_retrieval_components(matcher, vision_model, ImagePreprocessor(vision_model.image_size))


def _qformer_config(
    config: LavisConfig, tensors: Mapping[str, Tensor], vision_model: VisionEncoder, path: Path
) -> QFormerConfig:
    """Derive the sizes of a Q-Former from its tensors; heads, dropout and epsilon are BERT's in LAVIS."""
    _check_qformer(tensors, path)
    _, num_query_tokens, hidden_size = _shape(tensors, "query_tokens", path, default=(0, 0, 0))
    intermediate_size, _ = _shape(tensors, _FIRST_FFN, path, default=(0, 0))
    vocab_size, _ = _shape(tensors, "embeddings.word_embeddings.weight", path, default=(30523, 0))
    max_positions, _ = _shape(tensors, "embeddings.position_embeddings.weight", path, default=(512, 0))
    joint_size, _ = _shape(tensors, "text_projection.weight", path, default=(256, 0))
    layers = {name.split(".")[3] for name in tensors if name.startswith("qformer.encoder.layer.")}
    try:
        return QFormerConfig(
            hidden_size=hidden_size,
            num_hidden_layers=sum(map(str.isdigit, layers)),
            num_attention_heads=config.num_attention_heads or max(1, hidden_size // _BERT_HEAD_SIZE),
            intermediate_size=intermediate_size,
            encoder_hidden_size=vision_model.hidden_size,
            num_query_tokens=num_query_tokens,
            vocab_size=vocab_size,
            max_position_embeddings=max_positions,
            joint_size=joint_size,
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_qformer(tensors: Mapping[str, Tensor], path: Path) -> None:
    for name in ("query_tokens", _FIRST_FFN):
        if name not in tensors:
            raise CheckpointError(
                f"{path} holds no Q-Former ({name!r} is not there); give a .pth file that BLIP-2 of LAVIS "
                "saved"
            )


def _shape(
    tensors: Mapping[str, Tensor], name: str, path: Path, *, default: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the shape of a tensor, of the rank of `default`, which is that of an absent one."""
    shape = tuple(tensors[name].shape) if name in tensors else default
    if len(shape) != len(default):
        raise CheckpointError(
            f"{path}: the tensor {name!r} has shape {list(shape)}, {len(default)} dimensions are needed; it "
            "was damaged, or belongs to another model: save the checkpoint again"
        )
    return shape


def _named_sources(config: LavisConfig, path: Path) -> tuple[Source, ...]:
    """Return the fingerprint sources of the directories in a .json: hashes of weights, configurations."""
    sources: list[Source] = []
    for name in (config.vision_model, config.language_model):
        files = sorted((path.parent / name).glob("model*.safetensors")) if name else []
        sources += [partial(hash_file, file) for file in files]
        if name and (configuration := path.parent / name / "config.json").is_file():
            sources.append(configuration.read_text(encoding="utf-8"))
    return tuple(sources)
