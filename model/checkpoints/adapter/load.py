"""Our own format: an adapter holds what training made and names the frozen parts it was made on.

config.json           see `AdapterConfig`
adapter.safetensors   query_tokens, ln_vision.*, qformer.*, language_projection.*  (generation),
                      or all tensors of the Matcher, the tied one once             (retrieval)
tokenizer*.json       of the text side                                             (retrieval)
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoints.adapter.config import FORMAT, AdapterConfig, FrozenPart
from model.checkpoints.frozen.vision_model import (
    IN_FLOAT32,
    load_language_model,
    load_text_tokenizer,
    load_vision_model,
)
from model.checkpoints.json_records import read_json
from model.checkpoints.load_options import LoadOptions
from model.checkpoints.loaded_checkpoint import LoadedParts
from model.checkpoints.qformer_branch import build_generation_parts, build_retrieval_parts
from model.checkpoints.resolve import locate
from model.checkpoints.tensors import TensorFiles, load_strictly
from model.components import Blip2Parts
from model.errors import CheckpointError
from model.matching import Matcher
from model.preprocess import ImagePreprocessor
from model.qformer.questions import QuestionReader
from model.vision import VisionEncoder

ADAPTER = "adapter.safetensors"
TIED_HEAD = "text_head.decoder.weight"


def load_adapter(directory: Path, options: LoadOptions = IN_FLOAT32) -> LoadedParts:
    """Loads an adapter and the frozen parts it names.

    Raises CheckpointError where a file is absent or damaged, or where a frozen part is not the one that
    the adapter was trained on.
    """
    config = AdapterConfig.read(directory)
    options = replace(options, image_size=options.image_size or config.image.size)
    vision_model = load_vision_model(
        _verify(directory, config.vision_model), options, feature_layer=config.feature_layer
    )
    _check_fit(directory, config, vision_model)
    load = _load_retrieval_parts if config.kind == "retrieval" else _load_generation_parts
    parts = load(directory, config, vision_model, options)
    return LoadedParts(parts, _sources(directory, config))


def find_retrieval_model(directory: Path) -> Path:
    """Gives the retrieval adapter that a generation adapter names, and any other directory as it is."""
    if read_json(directory / "config.json").get("format") != FORMAT:
        return directory
    return directory / (AdapterConfig.read(directory).retrieval_model or "")


def _load_retrieval_parts(
    directory: Path, config: AdapterConfig, vision_model: VisionEncoder, options: LoadOptions
) -> Blip2Parts:
    matcher = _load_matcher(directory, config, vision_model, options)
    return build_retrieval_parts(matcher, vision_model, _build_preprocessor(config, vision_model))


def _load_generation_parts(
    directory: Path, config: AdapterConfig, vision_model: VisionEncoder, options: LoadOptions
) -> Blip2Parts:
    assert config.language_model is not None, "the configuration was checked when it was read"
    return build_generation_parts(
        config.qformer,
        _read_trained(directory, options),
        vision_model,
        load_language_model(_verify(directory, config.language_model), options),
        preprocess=_build_preprocessor(config, vision_model),
        source=directory / ADAPTER,
        question_reader=_build_question_reader(directory, config) if config.question_conditioned else None,
        prompts=config.prompts,
        matcher=_load_named_matcher(directory, config, vision_model, options),
    )


def _build_question_reader(directory: Path, config: AdapterConfig) -> QuestionReader:
    tokenizer = load_text_tokenizer(directory)
    with torch.device("meta"):
        return QuestionReader(config.qformer, tokenizer, max_text_tokens=config.max_text_tokens)


def _build_preprocessor(config: AdapterConfig, vision_model: VisionEncoder) -> ImagePreprocessor:
    return ImagePreprocessor(vision_model.image_size, config.image.mean, config.image.std)


def _read_trained(directory: Path, options: LoadOptions) -> dict[str, Tensor]:
    return TensorFiles(directory, ADAPTER).read(dtype=torch.float32, device=options.device)


def _load_named_matcher(
    directory: Path, config: AdapterConfig, vision_model: VisionEncoder, options: LoadOptions
) -> Matcher | None:
    """Loads the retrieval model a generation adapter names; it must see through the same encoder."""
    if config.retrieval_model is None:
        return None
    matcher_directory = directory / config.retrieval_model
    matcher_config = AdapterConfig.read(matcher_directory)
    if matcher_config.kind != "retrieval":
        raise CheckpointError(f"{matcher_directory} is no retrieval adapter; name one as 'retrieval_model'")
    same_encoder = matcher_config.vision_model.sha256 == config.vision_model.sha256
    same_features = (matcher_config.image, matcher_config.feature_layer) == (
        config.image,
        config.feature_layer,
    )
    if not same_encoder or not same_features:
        raise CheckpointError(
            f"{matcher_directory} was trained on another vision model or image format than {directory}; "
            "name a retrieval_model trained on the same ones, for the two share their image features"
        )
    return _load_matcher(matcher_directory, matcher_config, vision_model, options)


def _load_matcher(
    directory: Path, config: AdapterConfig, vision_model: VisionEncoder, options: LoadOptions
) -> Matcher:
    tokenizer = load_text_tokenizer(directory)
    with torch.device("meta"):
        matcher = Matcher(
            config.qformer,
            tokenizer,
            max_text_tokens=config.max_text_tokens,
            vision_layer_norm_eps=vision_model.layer_norm_eps,
        )
    if not config.has_text_head:
        matcher.text_head = None
    tensors = _read_trained(directory, options)
    load_strictly(matcher, tensors, source=directory / ADAPTER, tied=[TIED_HEAD])
    matcher.tie_text_head()
    return matcher


def _verify(directory: Path, part: FrozenPart) -> Path:
    """Gives the directory of a frozen part whose weights are those the adapter was trained on."""
    part_directory = find_part(directory, part)
    if (found := TensorFiles(part_directory).sha256()) != part.sha256:
        raise CheckpointError(
            f"the weights in {part_directory} have sha256 {found}, {directory} was trained on {part.sha256}; "
            "put the frozen part back, or train the adapter again on this one"
        )
    return part_directory


def find_part(directory: Path, part: FrozenPart) -> Path:
    """Gives the directory of a frozen part, named relative to the adapter's, or on the Hub."""
    return directory / part.path if part.revision is None else locate(part.path, revision=part.revision)


def _check_fit(directory: Path, config: AdapterConfig, vision_model: VisionEncoder) -> None:
    if vision_model.hidden_size != config.qformer.encoder_hidden_size:
        raise CheckpointError(
            f"{directory / 'config.json'} asks for image features of width "
            f"{config.qformer.encoder_hidden_size}, its vision model gives {vision_model.hidden_size}; "
            "correct 'qformer'"
        )


def _sources(directory: Path, config: AdapterConfig) -> tuple[str, ...]:
    """Gives what identifies an adapter; its config.json holds the verified hashes of the frozen parts."""
    named = [part for part in (config.vision_model, config.language_model) if part is not None]
    texts = [(directory / "config.json").read_text(encoding="utf-8")]
    texts += [(find_part(directory, part) / "config.json").read_text(encoding="utf-8") for part in named]
    own = (TensorFiles(directory, ADAPTER).sha256(), *texts)
    if config.retrieval_model is None:
        return own
    matcher_directory = directory / config.retrieval_model
    return (*own, *_sources(matcher_directory, AdapterConfig.read(matcher_directory)))
