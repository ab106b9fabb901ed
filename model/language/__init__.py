"""The frozen language model: soft tokens and a prompt in, text out. What tells OPT from T5 when it runs."""

from model.language.family import DecodingState
from model.language.language_model import LanguageModel

__all__ = ["DecodingState", "LanguageModel"]
