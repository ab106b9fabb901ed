"""The frozen parts, each a directory as transformers' `save_pretrained` writes it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Blip2VisionConfig,
    PreTrainedTokenizerFast,
)

from model.checkpoints.llm import find_format, load_llm
from model.checkpoints.tensors import TensorFiles, load_strictly, read_json
from model.errors import CheckpointError
from model.language import LanguageModel
from model.vision import VisionEncoder, build_vision_encoder

C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)

FINAL_NORM = "post_layernorm."


def load_vision_model(
    directory: Path, *, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> VisionEncoder:
    """Loads a Blip2VisionModel directory, frozen, on the CPU. A final norm in the file is left unread.

    Raises CheckpointError where a file is absent, damaged or of another model.
    """
    config = build_config(Blip2VisionConfig, directory / "config.json", read_json(directory / "config.json"))
    files = TensorFiles(directory)
    tensors = files.read(skip=(FINAL_NORM,), dtype=dtype)
    return assemble_vision_model(config, tensors, source=files.path, attn_implementation=attn_implementation)


def assemble_vision_model(
    config: Blip2VisionConfig,
    tensors: Mapping[str, Tensor],
    *,
    source: Path,
    attn_implementation: str = "sdpa",
) -> VisionEncoder:
    """Builds the encoder around the tensors of its tower; nothing is initialised only to be overwritten."""
    with torch.device("meta"):
        encoder = build_vision_encoder(config, attn_implementation=attn_implementation)
    load_strictly(encoder.tower, tensors, source=source)
    return freeze(encoder)


def load_language_model(directory: Path, *, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Loads an OPTForCausalLM or T5ForConditionalGeneration directory with its tokenizer, frozen, on the CPU.

    Raises CheckpointError where a file is absent, damaged or of another model, and for a T5 in float16.
    """
    path = directory / "config.json"
    fields = read_json(path)
    config = build_config(find_format(fields.get("model_type"), path).config_class, path, fields)
    has_own_head = fields.get("tie_word_embeddings") is False
    llm = load_llm(config, TensorFiles(directory), path=path, dtype=dtype, has_own_head=has_own_head)
    return freeze(LanguageModel(llm, load_tokenizer(directory)))


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a directory; never from the network."""
    try:
        if (directory / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{directory} holds no tokenizer that can be read ({error}); put tokenizer.json and "
            "tokenizer_config.json there"
        ) from error


def build_config(config_class: type[C], path: Path, fields: Mapping[str, Any]) -> C:
    """Builds a transformers configuration. Raises CheckpointError where the file is of another model."""
    expected = getattr(config_class, "model_type", None)
    if (found := fields.get("model_type")) != expected:
        raise CheckpointError(f"{path} is of model type {found!r}, {expected!r} is needed here")
    try:
        return config_class.from_dict(dict(fields))  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a valid configuration ({error})") from error


def freeze(module: M) -> M:
    """Puts a module into evaluation mode, without gradients of its weights."""
    return module.requires_grad_(False).eval()
