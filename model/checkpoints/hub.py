"""The Hub's format: what transformers' BLIP-2 classes save, with a language model (OPT or T5) or none.

Both classes hold vision_model.*, qformer.* and query_tokens. Blip2ForConditionalGeneration adds
language_projection.* and language_model.*, Blip2ForImageTextRetrieval embeddings.* and three heads.

In both, `vision_model.post_layernorm` is what everyone else calls `ln_vision`. The retrieval format dropped
the text head and the temperature: the one is then unavailable, the other the value training starts from.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Blip2Config

from model.checkpoints.frozen import (
    FINAL_NORM,
    LANGUAGE,
    VISION,
    build_config,
    load_language_model,
    load_tokenizer,
    load_vision_model,
)
from model.checkpoints.loaded import LoadedParts
from model.checkpoints.query_branch import QueryBranch
from model.checkpoints.records import read_json
from model.checkpoints.tensors import TensorFiles, load_strictly
from model.config import QFormerConfig
from model.errors import CheckpointError
from model.matching import INITIAL_TEMPERATURE, Matcher
from model.parts import Blip2Parts
from model.preprocess import CLIP_MEAN, CLIP_STD, ImagePreprocessor
from model.prompts import PromptTemplates

GENERATION = "Blip2ForConditionalGeneration"
RETRIEVAL = "Blip2ForImageTextRetrieval"


def load_hub(directory: Path, *, dtype: torch.dtype, image_size: int | None = None) -> LoadedParts:
    """Loads a directory in the Hub's format, on the CPU: the frozen parts in `dtype`, the rest in float32.

    image_size: of the images to read, where not the configuration's.
    Raises CheckpointError where a file is absent, damaged or of a model that is not supported.
    """
    path = directory / "config.json"
    fields: dict[str, Any] = read_json(path)
    config = build_config(Blip2Config, path, fields)
    architectures = fields.get("architectures") or []
    files = TensorFiles(directory)
    if RETRIEVAL in architectures:
        parts = _load_retrieval(config, files, dtype, image_size)
    elif GENERATION in architectures:
        parts = _load_generation(config, files, dtype, image_size)
    else:
        raise CheckpointError(
            f"{path} is of architecture {architectures}; {GENERATION} and {RETRIEVAL} can be loaded"
        )
    return LoadedParts(parts, (files.sha256(), path.read_text(encoding="utf-8")))


def _load_generation(
    config: Blip2Config, files: TensorFiles, dtype: torch.dtype, image_size: int | None
) -> Blip2Parts:
    directory = files.directory
    language_model = load_language_model(directory, dtype=dtype)
    vision_model = load_vision_model(directory, dtype=dtype, image_size=image_size)
    with torch.device("meta"):
        branch = QueryBranch(
            _qformer_config(config),
            language_model_size=language_model.hidden_size,
            layer_norm_eps=vision_model.layer_norm_eps,
        )
    load_strictly(branch, _others(files), source=files.path)
    return Blip2Parts(
        vision_model=vision_model,
        preprocess=_load_preprocessor(directory, vision_model.image_size),
        ln_vision=branch.ln_vision,
        query_tokens=branch.query_tokens,
        qformer=branch.qformer,
        language_projection=branch.language_projection,
        language_model=language_model,
        prompts=PromptTemplates(question=language_model.question_template),
    )


def _load_retrieval(
    config: Blip2Config, files: TensorFiles, dtype: torch.dtype, image_size: int | None
) -> Blip2Parts:
    directory = files.directory
    vision_model = load_vision_model(directory, dtype=dtype, image_size=image_size)
    tokenizer = load_tokenizer(directory)
    with torch.device("meta"):
        matcher = Matcher(
            _qformer_config(config), tokenizer, vision_layer_norm_eps=vision_model.layer_norm_eps
        )
    matcher.text_head = None
    tensors = {"temperature": torch.tensor(INITIAL_TEMPERATURE), **_others(files)}
    load_strictly(matcher, tensors, source=files.path)
    return Blip2Parts(
        vision_model=vision_model,
        preprocess=_load_preprocessor(directory, vision_model.image_size),
        ln_vision=matcher.ln_vision,
        query_tokens=matcher.query_tokens,
        qformer=matcher.qformer,
        matcher=matcher,
    )


def _others(files: TensorFiles) -> dict[str, Tensor]:
    """Gives what is neither encoder nor language model, in float32."""
    norm = files.read(VISION + FINAL_NORM, dtype=torch.float32)
    others = files.read(skip=(VISION, LANGUAGE), dtype=torch.float32)
    return others | {f"ln_vision.{name}": tensor for name, tensor in norm.items()}


def _qformer_config(config: Blip2Config) -> QFormerConfig:
    sizes = config.qformer_config
    if sizes.hidden_act != "gelu":
        raise CheckpointError(
            f"the Q-Former uses the activation {sizes.hidden_act!r}; only 'gelu' is supported"
        )
    return QFormerConfig(
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        intermediate_size=sizes.intermediate_size,
        encoder_hidden_size=sizes.encoder_hidden_size,
        num_query_tokens=config.num_query_tokens,
        vocab_size=sizes.vocab_size,
        max_position_embeddings=sizes.max_position_embeddings,
        joint_size=config.image_text_hidden_size,
        cross_attention_frequency=sizes.cross_attention_frequency,
        layer_norm_eps=sizes.layer_norm_eps,
        hidden_dropout_prob=sizes.hidden_dropout_prob,
        attention_probs_dropout_prob=sizes.attention_probs_dropout_prob,
        initializer_range=sizes.initializer_range,
    )


def _load_preprocessor(directory: Path, image_size: int) -> ImagePreprocessor:
    """Reads mean and deviation from the file that old or, second, new releases of transformers write."""
    fields: dict[str, Any] = {}
    if (path := directory / "preprocessor_config.json").is_file():
        fields = read_json(path)
    elif (path := directory / "processor_config.json").is_file():
        nested = read_json(path).get("image_processor")
        fields = nested if isinstance(nested, dict) else {}
    mean, std = fields.get("image_mean", CLIP_MEAN), fields.get("image_std", CLIP_STD)
    return ImagePreprocessor(image_size, mean, std)
