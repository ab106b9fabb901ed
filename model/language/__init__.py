"""The frozen language model: soft tokens and a prompt in, tokens out."""

from model.language.decoding_state import DecodeInput, DecodingState, IntArray, MemoryRequirement
from model.language.language_model import LanguageModel
from model.language.model_family import SpecialTokenTemplate
from model.language.prompt_tokenizer import find_eos_token_ids

__all__ = [
    "DecodeInput",
    "DecodingState",
    "IntArray",
    "LanguageModel",
    "MemoryRequirement",
    "SpecialTokenTemplate",
    "find_eos_token_ids",
]
