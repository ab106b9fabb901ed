"""The frozen parts, each a directory as transformers' `save_pretrained` writes it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Blip2VisionConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from model.checkpoints.tensors import TensorFiles, load_strictly, read_json
from model.errors import CheckpointError
from model.language import LanguageModel
from model.vision import VisionEncoder, build_vision_encoder

C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)

LM_HEAD = "lm_head.weight"
WORD_EMBEDDINGS = "model.decoder.embed_tokens.weight"
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
    """Loads an OPTForCausalLM directory with its tokenizer, frozen, on the CPU.

    Raises CheckpointError where a file is absent, damaged or of another model.
    """
    fields = read_json(directory / "config.json")
    config = build_config(OPTConfig, directory / "config.json", fields)
    files = TensorFiles(directory)
    llm = assemble_opt(config, files.read(dtype=dtype), source=files.path)
    return freeze(LanguageModel(llm, load_tokenizer(directory)))


def assemble_opt(config: OPTConfig, tensors: dict[str, Tensor], *, source: Path) -> OPTForCausalLM:
    """Builds an OPT around its tensors; its head is the word embeddings unless the file holds another one."""
    with torch.device("meta"):
        llm = OPTForCausalLM(config)
    head = tensors.pop(LM_HEAD, None)
    load_strictly(llm, tensors, source=source, tied=[LM_HEAD])
    if head is not None and head.shape != tensors[WORD_EMBEDDINGS].shape:
        raise CheckpointError(
            f"{source}: the tensor {LM_HEAD!r} has shape {list(head.shape)}, the configuration says "
            f"{list(tensors[WORD_EMBEDDINGS].shape)}; use the config.json that was saved with these weights"
        )
    if head is None or torch.equal(head, tensors[WORD_EMBEDDINGS]):
        llm.lm_head.weight = llm.get_input_embeddings().weight
    else:
        llm.lm_head.weight = nn.Parameter(head)
    return llm


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
