"""Loads adapters: the trained tensors, with references to the frozen models they were trained on.

config.json           see `AdapterConfig`
adapter.safetensors   query_tokens, ln_vision.*, qformer.*, language_projection.*  (generation),
                      or all tensors of the Matcher, the tied one once             (retrieval)
tokenizer*.json       of the texts                                                 (retrieval)
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoints.adapter.config import FORMAT, AdapterConfig, FrozenModelRef
from model.checkpoints.frozen import load_language_model, load_text_tokenizer, load_vision_model
from model.checkpoints.json_records import read_json
from model.checkpoints.load_options import IN_FLOAT32, LoadOptions
from model.checkpoints.loaded_checkpoint import LoadedCheckpoint
from model.checkpoints.qformer_branch import build_generation_components, build_retrieval_components
from model.checkpoints.resolve import resolve
from model.checkpoints.strict_loading import build_on_meta, load_strictly
from model.checkpoints.tensors import TensorFiles
from model.components import Blip2Components
from model.errors import CheckpointError
from model.matching import Matcher
from model.preprocess import ImagePreprocessor
from model.qformer.text import QuestionEmbedder
from model.vision import VisionEncoder

ADAPTER = "adapter.safetensors"
TIED_HEAD = "text_head.decoder.weight"


def load_adapter(directory: Path, options: LoadOptions = IN_FLOAT32) -> LoadedCheckpoint:
    """Load an adapter and its frozen models.

    Raises CheckpointError where a file is absent or damaged, or where a frozen model is not the one that
    the adapter was trained on.
    """
    config = AdapterConfig.read(directory)
    options = replace(options, image_size=options.image_size or config.image.size)
    vision_model = load_vision_model(
        _verify(directory, config.vision_model), options, feature_layer=config.feature_layer
    )
    _check_fit(directory, config, vision_model)
    load = _load_retrieval if config.kind == "retrieval" else _load_generation
    components = load(directory, config, vision_model, options)
    return LoadedCheckpoint(components, _sources(directory, config))


def find_retrieval_model(directory: Path) -> Path:
    """Return the retrieval adapter that a generation adapter names, or the directory itself."""
    if read_json(directory / "config.json").get("format") != FORMAT:
        return directory
    return directory / (AdapterConfig.read(directory).retrieval_model or "")


def _load_retrieval(
    directory: Path, config: AdapterConfig, vision_model: VisionEncoder, options: LoadOptions
) -> Blip2Components:
    matcher = _load_matcher(directory, config, vision_model, options)
    return build_retrieval_components(matcher, vision_model, _build_preprocessor(config, vision_model))


def _load_generation(
    directory: Path, config: AdapterConfig, vision_model: VisionEncoder, options: LoadOptions
) -> Blip2Components:
    assert config.language_model is not None, "the configuration was checked when it was read"
    components = build_generation_components(
        config.qformer,
        _read_trained(directory, options),
        vision_model,
        load_language_model(_verify(directory, config.language_model), options),
        preprocess=_build_preprocessor(config, vision_model),
        source=directory / ADAPTER,
        question_embedder=_build_question_embedder(directory, config),
    )
    matcher = _load_named_matcher(directory, config, vision_model, options)
    return replace(components, matcher=matcher, prompts=config.prompts or components.prompts)


def _build_question_embedder(directory: Path, config: AdapterConfig) -> QuestionEmbedder | None:
    if not config.question_conditioned:
        return None
    tokenizer = load_text_tokenizer(directory, config.qformer.vocab_size)
    with build_on_meta(directory / ADAPTER):
        return QuestionEmbedder(config.qformer, tokenizer, max_text_tokens=config.max_text_tokens)


def _build_preprocessor(config: AdapterConfig, vision_model: VisionEncoder) -> ImagePreprocessor:
    return ImagePreprocessor(vision_model.image_size, config.image.mean, config.image.std)


def _read_trained(directory: Path, options: LoadOptions) -> dict[str, Tensor]:
    return TensorFiles(directory, ADAPTER).read(dtype=torch.float32, device=options.device)


def _load_named_matcher(
    directory: Path, config: AdapterConfig, vision_model: VisionEncoder, options: LoadOptions
) -> Matcher | None:
    """Load the retrieval model that a generation adapter names; it must have the same encoder."""
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
    tokenizer = load_text_tokenizer(directory, config.qformer.vocab_size)
    tensors = _read_trained(directory, options)
    with build_on_meta(directory / ADAPTER):
        matcher = Matcher(
            config.qformer,
            tokenizer,
            max_text_tokens=config.max_text_tokens,
            vision_layer_norm_eps=vision_model.layer_norm_eps,
        )
    if not config.has_text_head:
        matcher.text_head = None
    load_strictly(matcher, tensors, source=directory / ADAPTER, tied=[TIED_HEAD])
    matcher.tie_text_head()
    return matcher


def _verify(directory: Path, reference: FrozenModelRef) -> Path:
    """Return the directory of a frozen model, after comparing the hash of its weights."""
    frozen_directory = find_frozen_model(directory, reference)
    if (found := TensorFiles(frozen_directory).sha256()) != reference.sha256:
        raise CheckpointError(
            f"the weights in {frozen_directory} have sha256 {found}, {directory} was trained on "
            f"{reference.sha256}; "
            "put the frozen part back, or train the adapter again on this one"
        )
    return frozen_directory


def find_frozen_model(directory: Path, reference: FrozenModelRef) -> Path:
    """Return the directory of a frozen model: relative to the adapter's, or a download of the Hub."""
    if reference.revision is None:
        return directory / reference.path
    return resolve(reference.path, revision=reference.revision)


def _check_fit(directory: Path, config: AdapterConfig, vision_model: VisionEncoder) -> None:
    if vision_model.hidden_size != config.qformer.encoder_hidden_size:
        raise CheckpointError(
            f"{directory / 'config.json'} asks for image features of width "
            f"{config.qformer.encoder_hidden_size}, its vision model gives {vision_model.hidden_size}; "
            "correct 'qformer'"
        )


def _sources(directory: Path, config: AdapterConfig) -> tuple[str, ...]:
    """Return the fingerprint sources of an adapter; its config.json holds the hashes of the frozen models."""
    references = [each for each in (config.vision_model, config.language_model) if each is not None]
    texts = [(directory / "config.json").read_text(encoding="utf-8")]
    for each in references:
        texts.append((find_frozen_model(directory, each) / "config.json").read_text(encoding="utf-8"))
    sources = (TensorFiles(directory, ADAPTER).sha256(), *texts)
    if config.retrieval_model is None:
        return sources
    matcher_directory = directory / config.retrieval_model
    return (*sources, *_sources(matcher_directory, AdapterConfig.read(matcher_directory)))
