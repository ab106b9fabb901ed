"""Saves the Hub's format, which `transformers`' BLIP-2 classes read."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from model.checkpoints.frozen import BLIP2_VISION, FINAL_NORM_PREFIX, LANGUAGE_PREFIX, VISION_PREFIX
from model.checkpoints.hub.processor import build_processor_tokenizer, save_processor
from model.checkpoints.qformer_branch import qformer_branch_tensors
from model.components import Blip2Components
from model.errors import CheckpointError
from model.language import LanguageModel, SpecialTokenTemplate
from model.matching import Matcher
from model.text_encoder import IMAGE_TOKEN

# Tensors that the retrieval format does not have.
DROPPED = ("text_head.", "temperature")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_GENERATION = frozenset(GenerationConfig().to_dict())


def save_hub(directory: Path, components: Blip2Components) -> None:
    """Save a model in the Hub's format, with its tokenizer and the configuration of its processor.

    With a language model, for `Blip2ForConditionalGeneration`, without matcher and prompts; else for
    `Blip2ForImageTextRetrieval`, without text head and temperature. The format has none of these. Raises
    CheckpointError where these classes do not support the image encoder or the language model.
    """
    if (found := components.vision_model.vit.config.model_type) != BLIP2_VISION:
        raise CheckpointError(
            f"the image encoder is of type {found!r}, and transformers' BLIP-2 has {BLIP2_VISION!r} only; "
            "save an adapter instead"
        )
    if components.language_model is not None:
        tokenizer = _save_generation(directory, components, components.language_model)
    else:
        assert components.matcher is not None, "a model without a language model has a matcher"
        tokenizer = _save_retrieval(directory, components, components.matcher)
    num_query_tokens = components.qformer.config.num_query_tokens
    save_processor(directory, tokenizer, components.preprocess, num_query_tokens=num_query_tokens)


def _save_generation(
    directory: Path, components: Blip2Components, language_model: LanguageModel
) -> PreTrainedTokenizerFast:
    llm, special_tokens = language_model.llm, language_model.model_family.special_tokens
    tokenizer = build_processor_tokenizer(language_model.tokenizer, special_tokens)
    if not llm.config.is_encoder_decoder:  # on the right, padding would stand between prompt and answer
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # both: else it is not saved
    _check_image_token(language_model, tokenizer)
    language = {LANGUAGE_PREFIX + name: tensor for name, tensor in llm.state_dict().items()}
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(_config(components, tokenizer, _text_config(language_model)))
    model.load_state_dict(
        _hub_tensors(qformer_branch_tensors(components), components) | language, assign=True
    )
    model.language_model = llm  # keeps a head that is not tied
    model.save_pretrained(directory)
    return tokenizer


def _save_retrieval(
    directory: Path, components: Blip2Components, matcher: Matcher
) -> PreTrainedTokenizerFast:
    text_tokenizer = matcher.tokenizer
    special_tokens = SpecialTokenTemplate((text_tokenizer.cls_token_id,), (text_tokenizer.sep_token_id,))
    tokenizer = build_processor_tokenizer(text_tokenizer, special_tokens)
    tensors = {name: value for name, value in matcher.state_dict().items() if not name.startswith(DROPPED)}
    with torch.device("meta"):
        model = Blip2ForImageTextRetrieval(_config(components, tokenizer, None))
    model.load_state_dict(_hub_tensors(tensors, components), assign=True)
    model.save_pretrained(directory)
    return tokenizer


def _check_image_token(language_model: LanguageModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise CheckpointError where "<image>" has no word embedding: transformers looks it up."""
    token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if token_id >= language_model.num_embeddings:
        raise CheckpointError(
            f"transformers' BLIP-2 marks images by a token {IMAGE_TOKEN!r}, which would have the id "
            f"{token_id}, and the language model has {language_model.num_embeddings} word embeddings; "
            "save an adapter, or add embeddings with transformers' resize_token_embeddings"
        )


def _hub_tensors(trained: dict[str, Tensor], components: Blip2Components) -> dict[str, Tensor]:
    renamed = {
        name.replace("ln_vision.", VISION_PREFIX + FINAL_NORM_PREFIX): tensor
        for name, tensor in trained.items()
    }
    return renamed | {
        VISION_PREFIX + name: each for name, each in components.vision_model.backbone.state_dict().items()
    }


def _config(
    components: Blip2Components, tokenizer: PreTrainedTokenizerFast, text_config: dict[str, Any] | None
) -> Blip2Config:
    qformer = dataclasses.asdict(components.qformer.config)
    num_query_tokens, joint_size = qformer.pop("num_query_tokens"), qformer.pop("joint_size")
    qformer["use_qformer_text_input"] = text_config is None
    return Blip2Config(
        vision_config=components.vision_model.vit.config.to_dict(),
        qformer_config=qformer,
        text_config=text_config,
        num_query_tokens=num_query_tokens,
        image_text_hidden_size=joint_size,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )


def _text_config(language_model: LanguageModel) -> dict[str, Any]:
    """Return the configuration of a language model with all that `generate` reads, and nothing else, in it.

    transformers' BLIP-2 derives the generation config of its language model from these fields alone. Without
    a text, it puts the begin token behind the image tokens, where the special tokens of a prompt belong.
    """
    fields: dict[str, Any] = language_model.llm.config.to_dict()
    special_tokens = [*itertools.chain(*language_model.model_family.special_tokens)]
    if len(special_tokens) == 1:
        fields["bos_token_id"] = special_tokens[0]
    eos_token_ids = language_model.eos_token_ids
    fields["eos_token_id"] = eos_token_ids[0] if len(eos_token_ids) == 1 else list(eos_token_ids)
    return {key: value for key, value in fields.items() if key in _TOKEN_IDS or key not in _GENERATION}
