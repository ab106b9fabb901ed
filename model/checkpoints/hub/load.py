"""The Hub's format: what transformers' BLIP-2 classes save, with a language model or none.

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

from model.checkpoints.frozen.vision_model import (
    FINAL_NORM,
    IN_FLOAT32,
    LANGUAGE,
    VISION,
    build_config,
    load_language_model,
    load_text_tokenizer,
    load_vision_model,
)
from model.checkpoints.hub.preprocessor import load_preprocessor
from model.checkpoints.json_records import naming, read_json
from model.checkpoints.load_options import LoadOptions
from model.checkpoints.loaded_checkpoint import LoadedParts
from model.checkpoints.qformer_branch import build_generation_parts, build_retrieval_parts
from model.checkpoints.tensors import TensorFiles, load_strictly
from model.components import Blip2Parts
from model.config import QFormerConfig
from model.errors import CheckpointError
from model.matching import INITIAL_TEMPERATURE, Matcher

GENERATION = "Blip2ForConditionalGeneration"
RETRIEVAL = "Blip2ForImageTextRetrieval"


def load_hub(directory: Path, options: LoadOptions = IN_FLOAT32) -> LoadedParts:
    """Loads a directory in the Hub's format.

    Raises CheckpointError where a file is absent, damaged or of a model that is not supported.
    """
    path = directory / "config.json"
    fields: dict[str, Any] = read_json(path)
    config = build_config(Blip2Config, path, fields)
    architectures = fields.get("architectures") or []
    files = TensorFiles(directory)
    if RETRIEVAL in architectures:
        load = _load_retrieval
    elif GENERATION in architectures:
        load = _load_generation
    else:
        raise CheckpointError(
            f"{path} is of architecture {architectures}; {GENERATION} and {RETRIEVAL} can be loaded"
        )
    return LoadedParts(load(config, files, options), (files.sha256, path.read_text(encoding="utf-8")))


def _load_generation(config: Blip2Config, files: TensorFiles, options: LoadOptions) -> Blip2Parts:
    vision_model = load_vision_model(files.directory, options)
    return build_generation_parts(
        _qformer_config(config, files.path),
        _others(files, options),
        vision_model,
        load_language_model(files.directory, options),
        preprocess=load_preprocessor(files.directory, vision_model.image_size),
        source=files.path,
    )


def _load_retrieval(config: Blip2Config, files: TensorFiles, options: LoadOptions) -> Blip2Parts:
    vision_model = load_vision_model(files.directory, options)
    tokenizer = load_text_tokenizer(files.directory)
    with torch.device("meta"):
        matcher = Matcher(
            _qformer_config(config, files.path), tokenizer, vision_layer_norm_eps=vision_model.layer_norm_eps
        )
    matcher.text_head = None
    temperature = torch.tensor(INITIAL_TEMPERATURE, device=options.device)
    load_strictly(matcher, {"temperature": temperature, **_others(files, options)}, source=files.path)
    preprocess = load_preprocessor(files.directory, vision_model.image_size)
    return build_retrieval_parts(matcher, vision_model, preprocess)


def _others(files: TensorFiles, options: LoadOptions) -> dict[str, Tensor]:
    """Gives what is neither encoder nor language model, in float32."""
    norm = files.read(VISION + FINAL_NORM, dtype=torch.float32, device=options.device)
    others = files.read(skip=(VISION, LANGUAGE), dtype=torch.float32, device=options.device)
    return others | {f"ln_vision.{name}": tensor for name, tensor in norm.items()}


def _qformer_config(config: Blip2Config, path: Path) -> QFormerConfig:
    sizes = config.qformer_config
    if sizes.hidden_act != "gelu":
        raise CheckpointError(
            f"the Q-Former uses the activation {sizes.hidden_act!r}; only 'gelu' is supported"
        )
    with naming(path):
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
