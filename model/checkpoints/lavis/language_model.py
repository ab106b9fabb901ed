"""LAVIS' changes to published language models: the end token of OPT, the activation of T5.

Its files were trained with these changes, and neither the .pth file nor the directory of the language model
says so.
"""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from model.checkpoints.lavis.config import LavisConfig
from model.errors import CheckpointError
from model.language import LanguageModel

ACTIVATION = "gelu"  # the exact one; Flan-T5's own configuration says "gelu_new"


def trained_fields(
    config: LavisConfig, llm_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    """Return the fields of a language model's configuration that LAVIS sets, or those that the .json names.

    None for a language model of another type than the .json's, which the caller refuses. Raises
    CheckpointError where the end token of an OPT is in neither its tokenizer nor the .json.
    """
    if config.arch != f"blip2_{llm_config.model_type}":
        return {}
    if config.arch == "blip2_t5":
        return {"dense_act_fn": config.dense_act_fn or ACTIVATION}
    if config.eos_token_ids is not None:
        return {"eos_token_id": list(config.eos_token_ids)}
    newline = find_newline(tokenizer)
    if newline is None:
        raise CheckpointError(
            f"the tokenizer of {config.language_model!r} has no token of a newline, which ends an answer in "
            "LAVIS; put OPT's tokenizer there, or name others as 'eos_token_ids' in the .json"
        )
    return {"eos_token_id": newline}


def differing_fields(language_model: LanguageModel) -> dict[str, object]:
    """Return the fields of a .json that `trained_fields` needs because the model is not as LAVIS makes it."""
    config = language_model.llm.config
    if config.model_type == "t5":
        return {} if config.dense_act_fn == ACTIVATION else {"dense_act_fn": config.dense_act_fn}
    has_newline = language_model.eos_token_ids == (find_newline(language_model.tokenizer),)
    return {} if has_newline else {"eos_token_ids": language_model.eos_token_ids}


def find_newline(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Return the id of a newline; None where the tokenizer has no single token for it."""
    token_ids = tokenizer.encode("\n", add_special_tokens=False)
    if len(token_ids) == 1 and token_ids[0] != tokenizer.unk_token_id:
        return token_ids[0]
    return tokenizer.get_vocab().get("\n")  # of a tokenizer that splits at white space
