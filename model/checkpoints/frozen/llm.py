"""Builds transformers' language models around the tensors of a file.

OPT and T5 are those of the published checkpoints; their tensors are read by the names of all releases. Any
other model that `transformers` can generate with is built by its own loader.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from model.checkpoints.frozen.transformers_loading import silence_transformers
from model.checkpoints.load_options import LoadOptions
from model.checkpoints.strict_loading import (
    build_on_meta,
    check_num_parameters,
    load_strictly,
    report_build_errors,
)
from model.checkpoints.tensors import TensorSource
from model.errors import CheckpointError

HEAD = "lm_head.weight"
_OVERFLOWING = ("t5", "mt5", "umt5", "longt5", "switch_transformers")  # activations exceed float16's range


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmFormat:
    """The file format of one type of language model.

    word_embeddings: the names of one matrix, which a file may hold under any of them.
    ignored: unused tensors of old releases. required: keys that the configuration must set.
    half: the 16-bit type that its authors ran it in.
    """

    config_class: type[PreTrainedConfig]
    llm_class: type[PreTrainedModel]
    word_embeddings: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    half: torch.dtype = torch.bfloat16


FORMATS: Mapping[str, LlmFormat] = {
    "opt": LlmFormat(
        config_class=OPTConfig,
        llm_class=OPTForCausalLM,
        word_embeddings=("model.decoder.embed_tokens.weight",),
        required=("bos_token_id",),
        half=torch.float16,
    ),
    "t5": LlmFormat(
        config_class=T5Config,
        llm_class=T5ForConditionalGeneration,
        word_embeddings=("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
        required=("decoder_start_token_id", "eos_token_id"),
    ),
}


def find_llm_config(model_type: object, path: Path) -> type[PreTrainedConfig]:
    """Return the class of the configuration at `path`.

    Raises CheckpointError where transformers has no model of that type that generates.
    """
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        config_class: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
        if model_type in FORMATS or _find_class(config_class) is not None:
            return config_class
    raise CheckpointError(
        f"{path} names a language model of type {model_type!r}; those that transformers has a causal or an "
        "encoder-decoder language model of can be loaded"
    )


def load_llm(
    config: PreTrainedConfig,
    files: TensorSource,
    *,
    path: Path,
    options: LoadOptions,
    prefix: str = "",
    has_own_head: bool = False,
) -> PreTrainedModel:
    """Build a language model around those tensors of `files` whose name begins with `prefix`.

    path: of the file that `config` was read from. has_own_head: whether the configuration says that the head
    is no copy of the word embeddings, so that it is required. Where the model is quantised or spread, the
    caller moves it to the device of `options`.
    Raises CheckpointError where tensors and configuration are not those of one supported model, or where
    the model cannot run in the type of `options`.
    """
    llm_format = FORMATS.get(config.model_type)
    dtype = options.pick_dtype(torch.bfloat16 if llm_format is None else llm_format.half)
    if dtype == torch.float16 and config.model_type in _OVERFLOWING and options.runs:
        raise CheckpointError(
            f"{path} names a language model of type {config.model_type!r}, which overflows in float16; "
            "load it in bfloat16 or float32"
        )
    if llm_format is None:
        return _load_by_transformers(config, files.read(prefix, dtype=dtype), source=files.path)
    _check_required(config, llm_format, path=path)
    tensors = files.read(prefix, dtype=dtype, device=options.first_device)
    return _build(config, llm_format, tensors, source=files.path, has_own_head=has_own_head)


def _build(
    config: PreTrainedConfig,
    llm_format: LlmFormat,
    tensors: dict[str, Tensor],
    *,
    source: Path,
    has_own_head: bool,
) -> PreTrainedModel:
    """Build an OPT or T5, whose head is the word embeddings unless it has its own."""
    for name in llm_format.ignored:
        tensors.pop(name, None)
    _merge_word_embeddings(tensors, llm_format.word_embeddings, source=source)
    with build_on_meta(source):
        llm = llm_format.llm_class(config)
    copies = llm_format.word_embeddings[1:]
    load_strictly(llm, tensors, source=source, tied=copies if has_own_head else (*copies, HEAD))
    llm.set_input_embeddings(llm.get_input_embeddings())  # replaces the copies too
    word_embeddings = llm.get_input_embeddings().weight
    if HEAD not in tensors or torch.equal(llm.lm_head.weight, word_embeddings):
        llm.lm_head.weight = word_embeddings
    return llm


def _load_by_transformers(
    config: PreTrainedConfig, tensors: dict[str, Tensor], *, source: Path
) -> PreTrainedModel:
    llm_class = _find_class(type(config))
    assert llm_class is not None, "the type was checked when the configuration was read"
    dtype = next((each.dtype for each in tensors.values() if each.is_floating_point()), torch.float32)
    with build_on_meta(source):
        empty = llm_class(config)
    check_num_parameters(empty, sum(each.numel() for each in tensors.values()), source=source)
    with report_build_errors(source), silence_transformers():
        llm, loading_info = llm_class.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    if missing := sorted(loading_info["missing_keys"]):
        raise CheckpointError(
            f"{source} lacks the tensor {missing[0]!r} ({len(missing)} are missing in all); save it again"
        )
    if unexpected := sorted(loading_info["unexpected_keys"]):
        raise CheckpointError(
            f"{source} holds the tensor {unexpected[0]!r}, which this model has no place for "
            f"({len(unexpected)} in all); use the config.json that was saved with it"
        )
    return llm


def _find_class(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel] | None:
    """Return the class that generates text, decoder-only or encoder-decoder."""
    for mapping in (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        if config_class in mapping:
            llm_class: type[PreTrainedModel] = mapping[config_class]
            parameters = signature(llm_class.forward).parameters
            return llm_class if parameters.keys() >= {"inputs_embeds", "past_key_values"} else None
    return None


def _check_required(config: PreTrainedConfig, llm_format: LlmFormat, *, path: Path) -> None:
    for key in llm_format.required:
        if getattr(config, key, None) is None:
            raise CheckpointError(
                f"{path} does not set {key!r} of its language model; use the config.json saved with it"
            )


def _merge_word_embeddings(tensors: dict[str, Tensor], names: Sequence[str], *, source: Path) -> None:
    """Rename the word embeddings to the first of their names, and drop equal copies."""
    found = [tensors.pop(name) for name in names if name in tensors]
    if any(not torch.equal(other, found[0]) for other in found[1:]):
        raise CheckpointError(
            f"{source} holds word embeddings that differ from each other ({', '.join(names)}); "
            "one matrix is needed: save the checkpoint again"
        )
    if found:
        tensors[names[0]] = found[0]
