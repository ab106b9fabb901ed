"""Our own format: an adapter holds what training made and names the frozen parts it was made on.

config.json           see `AdapterConfig`
adapter.safetensors   query_tokens, ln_vision.*, qformer.*, language_projection.*  (generation),
                      or all tensors of the Matcher, the tied one once             (retrieval)
tokenizer*.json       of the text side                                             (retrieval)
"""

from dataclasses import replace
from pathlib import Path

import torch

from model.checkpoints.adapter_config import AdapterConfig, FrozenPart, ImageConfig
from model.checkpoints.frozen import load_language_model, load_tokenizer, load_vision_model
from model.checkpoints.loaded import LoadedParts
from model.checkpoints.query_branch import QueryBranch
from model.checkpoints.tensors import TensorFiles, load_strictly
from model.errors import CheckpointError
from model.matching import Matcher
from model.parts import Blip2Parts
from model.prompts import PromptTemplates
from model.vision import VisionEncoder

ADAPTER = "adapter.safetensors"
TIED_HEAD = "text_head.decoder.weight"


def load_adapter(directory: Path, *, dtype: torch.dtype, image_size: int | None = None) -> LoadedParts:
    """Loads an adapter and the frozen parts it names, on the CPU: those in `dtype`, the rest in float32.

    image_size: of the images to read, where not those it was trained on.
    Raises CheckpointError where a file is absent or damaged, or where a frozen part is not the one that
    the adapter was trained on.
    """
    config = AdapterConfig.read(directory)
    image = config.image if image_size is None else replace(config.image, size=image_size)
    vision_model = load_vision_model(
        _verify(directory, config.vision_model),
        dtype=dtype,
        image_size=image.size,
        feature_layer=config.feature_layer,
    )
    _check_fit(directory, config, vision_model)
    if config.kind == "retrieval":
        parts = _load_retrieval_parts(directory, config, vision_model, image)
    else:
        parts = _load_generation_parts(directory, config, vision_model, image, dtype)
    return LoadedParts(parts, _sources(directory, config))


def _load_retrieval_parts(
    directory: Path, config: AdapterConfig, vision_model: VisionEncoder, image: ImageConfig
) -> Blip2Parts:
    matcher = _load_matcher(directory, config, vision_model)
    return Blip2Parts(
        vision_model=vision_model,
        preprocess=image.build_preprocessor(),
        ln_vision=matcher.ln_vision,
        query_tokens=matcher.query_tokens,
        qformer=matcher.qformer,
        matcher=matcher,
    )


def _load_generation_parts(
    directory: Path,
    config: AdapterConfig,
    vision_model: VisionEncoder,
    image: ImageConfig,
    dtype: torch.dtype,
) -> Blip2Parts:
    assert config.language_model is not None, "the configuration was checked when it was read"
    language_model = load_language_model(_verify(directory, config.language_model), dtype=dtype)
    with torch.device("meta"):
        branch = QueryBranch(
            config.qformer,
            language_model_size=language_model.hidden_size,
            layer_norm_eps=vision_model.layer_norm_eps,
        )
    tensors = TensorFiles(directory, ADAPTER).read(dtype=torch.float32)
    load_strictly(branch, tensors, source=directory / ADAPTER)
    return Blip2Parts(
        vision_model=vision_model,
        preprocess=image.build_preprocessor(),
        ln_vision=branch.ln_vision,
        query_tokens=branch.query_tokens,
        qformer=branch.qformer,
        language_projection=branch.language_projection,
        language_model=language_model,
        matcher=_load_named_matcher(directory, config, vision_model),
        prompts=config.prompts or PromptTemplates(question=language_model.question_template),
    )


def _load_named_matcher(
    directory: Path, config: AdapterConfig, vision_model: VisionEncoder
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
    return _load_matcher(matcher_directory, matcher_config, vision_model)


def _load_matcher(directory: Path, config: AdapterConfig, vision_model: VisionEncoder) -> Matcher:
    tokenizer = load_tokenizer(directory)
    with torch.device("meta"):
        matcher = Matcher(
            config.qformer,
            tokenizer,
            max_text_tokens=config.max_text_tokens,
            vision_layer_norm_eps=vision_model.layer_norm_eps,
        )
    if not config.has_text_head:
        matcher.text_head = None
    tensors = TensorFiles(directory, ADAPTER).read(dtype=torch.float32)
    load_strictly(matcher, tensors, source=directory / ADAPTER, tied=[TIED_HEAD])
    matcher.tie_text_head()
    return matcher


def _verify(directory: Path, part: FrozenPart) -> Path:
    """Gives the directory of a frozen part whose weights are those the adapter was trained on."""
    part_directory = directory / part.path
    if (found := TensorFiles(part_directory).sha256()) != part.sha256:
        raise CheckpointError(
            f"the weights in {part_directory} have sha256 {found}, {directory} was trained on {part.sha256}; "
            "put the frozen part back, or train the adapter again on this one"
        )
    return part_directory


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
    texts += [(directory / part.path / "config.json").read_text(encoding="utf-8") for part in named]
    own = (TensorFiles(directory, ADAPTER).sha256(), *texts)
    if config.retrieval_model is None:
        return own
    matcher_directory = directory / config.retrieval_model
    return (*own, *_sources(matcher_directory, AdapterConfig.read(matcher_directory)))
