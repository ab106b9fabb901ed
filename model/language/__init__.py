"""The frozen language model: soft tokens and a prompt in, text out; what tells the families apart."""

from model.language.family import DecodingState, Extent, Rows
from model.language.language_model import LanguageModel

__all__ = ["DecodingState", "Extent", "LanguageModel", "Rows"]
