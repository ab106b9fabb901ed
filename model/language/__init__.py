"""The frozen language model: soft tokens and a prompt in, tokens out."""

from model.language.decoding_state import DecodeInput, DecodingState, IntArray, MemoryRequirement
from model.language.language_model import LanguageModel

__all__ = ["DecodeInput", "DecodingState", "IntArray", "LanguageModel", "MemoryRequirement"]
