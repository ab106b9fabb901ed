"""Loads the Hub's format, as transformers' BLIP-2 classes save it, with a language model or without.

Both classes hold vision_model.*, qformer.* and query_tokens. Blip2ForConditionalGeneration adds
language_projection.* and language_model.*, Blip2ForImageTextRetrieval embeddings.* and three heads.

In both, `vision_model.post_layernorm` is the `ln_vision` of all other formats. The retrieval format has no
text head and no temperature: the former is then unavailable, the latter has its initial value.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Blip2Config

from model.checkpoints.frozen import (
    FINAL_NORM_PREFIX,
    LANGUAGE_PREFIX,
    VISION_PREFIX,
    load_language_model,
    load_text_tokenizer,
    load_vision_model,
)
from model.checkpoints.frozen.transformers_loading import build_config
from model.checkpoints.hub.preprocessor import load_preprocessor
from model.checkpoints.json_records import read_json
from model.checkpoints.load_options import IN_FLOAT32, LoadOptions
from model.checkpoints.loaded_checkpoint import LoadedCheckpoint
from model.checkpoints.qformer_branch import build_generation_components, build_retrieval_components
from model.checkpoints.strict_loading import build_on_meta, load_strictly, report_build_errors
from model.checkpoints.tensors import TensorFiles, TensorSource
from model.components import Blip2Components
from model.config import QFormerConfig
from model.errors import CheckpointError
from model.matching import INITIAL_TEMPERATURE, Matcher

GENERATION = "Blip2ForConditionalGeneration"
RETRIEVAL = "Blip2ForImageTextRetrieval"
_TEXT_BRANCH = re.compile(r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\.")


def load_hub(
    directory: Path, options: LoadOptions = IN_FLOAT32, *, tensors: TensorSource | None = None
) -> LoadedCheckpoint:
    """Load a directory in the Hub's format.

    tensors: its weights, where they are not those in the directory; the caller adds a source to the
    fingerprint. Raises CheckpointError where a file is absent, damaged or of a model that is not supported.
    """
    path = directory / "config.json"
    fields: dict[str, Any] = read_json(path)
    files = TensorFiles(directory)
    config = build_config(Blip2Config, path, fields)
    architectures = fields.get("architectures")
    if not isinstance(architectures, list):
        architectures = []
    if RETRIEVAL in architectures:
        load = _load_retrieval
    elif GENERATION in architectures:
        load = _load_generation
    else:
        raise CheckpointError(
            f"{path} is of architecture {fields.get('architectures')}; {GENERATION} and {RETRIEVAL} can be "
            "loaded"
        )
    components = load(config, directory, tensors or files, options)
    return LoadedCheckpoint(components, (files.sha256, path.read_text(encoding="utf-8")))


def _load_generation(
    config: Blip2Config, directory: Path, tensors: TensorSource, options: LoadOptions
) -> Blip2Components:
    vision_model = load_vision_model(directory, options, tensors=tensors)
    trained = _read_trained_tensors(tensors, options)
    if config.qformer_config.use_qformer_text_input:  # such a Q-Former has a text branch, which nothing uses
        trained = {name: each for name, each in trained.items() if not _TEXT_BRANCH.match(name)}
    return build_generation_components(
        _qformer_config(config, tensors.path),
        trained,
        vision_model,
        load_language_model(directory, options, tensors=tensors),
        preprocess=load_preprocessor(directory, vision_model.image_size),
        source=tensors.path,
    )


def _load_retrieval(
    config: Blip2Config, directory: Path, tensors: TensorSource, options: LoadOptions
) -> Blip2Components:
    vision_model = load_vision_model(directory, options, tensors=tensors)
    qformer_config = _qformer_config(config, tensors.path)
    tokenizer = load_text_tokenizer(directory, qformer_config.vocab_size)
    trained = {
        "temperature": torch.tensor(INITIAL_TEMPERATURE, device=options.device),
        **_read_trained_tensors(tensors, options),
    }
    with build_on_meta(tensors.path):
        matcher = Matcher(qformer_config, tokenizer, vision_layer_norm_eps=vision_model.layer_norm_eps)
    matcher.text_head = None
    load_strictly(matcher, trained, source=tensors.path)
    preprocess = load_preprocessor(directory, vision_model.image_size)
    return build_retrieval_components(matcher, vision_model, preprocess)


def _read_trained_tensors(tensors: TensorSource, options: LoadOptions) -> dict[str, Tensor]:
    """Read all tensors but those of encoder and language model, in float32."""
    norm = tensors.read(VISION_PREFIX + FINAL_NORM_PREFIX, dtype=torch.float32, device=options.device)
    trained = tensors.read(skip=(VISION_PREFIX, LANGUAGE_PREFIX), dtype=torch.float32, device=options.device)
    return trained | {f"ln_vision.{name}": tensor for name, tensor in norm.items()}


def _qformer_config(config: Blip2Config, path: Path) -> QFormerConfig:
    sizes = config.qformer_config
    if sizes.hidden_act != "gelu":
        raise CheckpointError(
            f"the Q-Former uses the activation {sizes.hidden_act!r}; only 'gelu' is supported"
        )
    with report_build_errors(path):
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
