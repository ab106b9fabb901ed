"""Loads a frozen language model with its tokenizer, from a directory as `save_pretrained` writes it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import Blip2Config, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from model.checkpoints.frozen.llm import find_llm_config, load_llm
from model.checkpoints.frozen.placement import place_llm
from model.checkpoints.frozen.tokenizer import load_tokenizer
from model.checkpoints.frozen.transformers_loading import build_config, freeze
from model.checkpoints.json_records import read_json
from model.checkpoints.load_options import IN_FLOAT32, LoadOptions
from model.checkpoints.tensors import TensorFiles, TensorSource
from model.errors import CheckpointError, UnfitLanguageModelError
from model.language import LanguageModel

LANGUAGE_PREFIX = "language_model."


def load_language_model(
    directory: Path,
    options: LoadOptions = IN_FLOAT32,
    *,
    tensors: TensorSource | None = None,
    trained_fields: Callable[[PreTrainedConfig, PreTrainedTokenizerFast], Mapping[str, Any]] | None = None,
) -> LanguageModel:
    """Load a language model and its tokenizer, frozen; or that of a whole BLIP-2 in the directory.

    tensors: its weights, as "language_model.*", unless they are in the directory. trained_fields: returns the
    fields of the configuration that a checkpoint was trained with, where the directory has others.
    Raises CheckpointError where a file is absent, damaged or of another model, and for a T5 in float16.
    """
    path = directory / "config.json"
    fields: dict[str, Any] = read_json(path)
    is_inside_blip2 = fields.get("model_type") == Blip2Config.model_type
    image_token_id = None
    if is_inside_blip2:
        blip2_config = build_config(Blip2Config, path, fields)
        config, image_token_id = blip2_config.text_config, blip2_config.image_token_index
        find_llm_config(config.model_type, path)
        fields = fields.get("text_config") or {}
    else:
        config = build_config(find_llm_config(fields.get("model_type"), path), path, fields)
    tokenizer = load_tokenizer(directory)
    changed = {} if trained_fields is None else trained_fields(config, tokenizer)
    for name, value in changed.items():
        setattr(config, name, value)
    llm = load_llm(
        config,
        tensors or TensorFiles(directory),
        path=path,
        options=options,
        prefix=LANGUAGE_PREFIX if is_inside_blip2 or tensors is not None else "",
        has_own_head=fields.get("tie_word_embeddings") is False,
    )
    if not is_inside_blip2 and "eos_token_id" not in changed:  # transformers' BLIP-2 ignores the file
        _read_eos_token_ids(llm, directory / "generation_config.json")
    try:
        return LanguageModel(place_llm(freeze(llm), options), tokenizer, image_token_id=image_token_id).eval()
    except UnfitLanguageModelError as error:
        raise CheckpointError(f"the language model of {directory} {error}") from error


def _read_eos_token_ids(llm: PreTrainedModel, path: Path) -> None:
    """Set the end tokens that a generation_config.json names, where there is one."""
    eos = read_json(path).get("eos_token_id") if path.is_file() else None
    if eos is not None and llm.generation_config is not None:
        llm.generation_config.eos_token_id = eos
