"""transformers' language models, built around the tensors of a file: OPT and T5."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from model.checkpoints.tensors import TensorSource, load_strictly
from model.errors import CheckpointError

HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmFormat:
    """How the language models of one type are saved.

    word_embeddings: the names of the one matrix in a file, which may hold it under any of them.
    ignored: tensors of old releases that nothing reads. required: keys the configuration must set.
    overflows_in_float16: whether its activations exceed the range of float16.
    """

    config_class: type[PreTrainedConfig]
    llm_class: type[PreTrainedModel]
    word_embeddings: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    overflows_in_float16: bool = False


FORMATS: Mapping[str, LlmFormat] = {
    "opt": LlmFormat(
        config_class=OPTConfig,
        llm_class=OPTForCausalLM,
        word_embeddings=("model.decoder.embed_tokens.weight",),
    ),
    "t5": LlmFormat(
        config_class=T5Config,
        llm_class=T5ForConditionalGeneration,
        word_embeddings=("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
        required=("decoder_start_token_id", "eos_token_id"),
        overflows_in_float16=True,
    ),
}


def find_format(model_type: object, path: Path) -> LlmFormat:
    """Gives the format of the type that the configuration at `path` names, or raises CheckpointError."""
    if not isinstance(model_type, str) or model_type not in FORMATS:
        raise CheckpointError(
            f"{path} names a language model of type {model_type!r}; those of {sorted(FORMATS)} can be loaded"
        )
    return FORMATS[model_type]


def load_llm(
    config: PreTrainedConfig,
    files: TensorSource,
    *,
    path: Path,
    dtype: torch.dtype,
    prefix: str = "",
    has_own_head: bool = False,
) -> PreTrainedModel:
    """Builds a language model in `dtype` around those tensors of `files` whose name begins with `prefix`.

    Its head is the word embeddings unless the files hold another one. path: of the file that `config` was
    read from. has_own_head: whether it says that the head is no copy, so that it must be there.
    Raises CheckpointError where tensors and configuration are not those of one supported model, or where
    the model cannot run in `dtype`.
    """
    llm_format = find_format(config.model_type, path)
    _check(config, llm_format, dtype=dtype, path=path)
    tensors = files.read(prefix, dtype=dtype)
    for name in llm_format.ignored:
        tensors.pop(name, None)
    _merge_word_embeddings(tensors, llm_format.word_embeddings, source=files.path)
    with torch.device("meta"):
        llm = llm_format.llm_class(config)
    copies = llm_format.word_embeddings[1:]
    load_strictly(llm, tensors, source=files.path, tied=copies if has_own_head else (*copies, HEAD))
    llm.set_input_embeddings(llm.get_input_embeddings())  # in the places of the copies too
    word_embeddings = llm.get_input_embeddings().weight
    if HEAD not in tensors or torch.equal(llm.lm_head.weight, word_embeddings):
        llm.lm_head.weight = word_embeddings
    return llm


def _check(config: PreTrainedConfig, llm_format: LlmFormat, *, dtype: torch.dtype, path: Path) -> None:
    if llm_format.overflows_in_float16 and dtype == torch.float16:
        raise CheckpointError(
            f"{path} names a language model of type {config.model_type!r}, which overflows in float16; "
            "load it in bfloat16 or float32"
        )
    for key in llm_format.required:
        if getattr(config, key, None) is None:
            raise CheckpointError(
                f"{path} does not set {key!r} of its language model; use the config.json saved with it"
            )


def _merge_word_embeddings(tensors: dict[str, Tensor], names: Sequence[str], *, source: Path) -> None:
    """Leaves the word embeddings under the first of their names alone, whichever the files used."""
    found = [tensors.pop(name) for name in names if name in tensors]
    if any(not torch.equal(other, found[0]) for other in found[1:]):
        raise CheckpointError(
            f"{source} holds word embeddings that differ from each other ({', '.join(names)}); "
            "one matrix is needed: save the checkpoint again"
        )
    if found:
        tensors[names[0]] = found[0]
