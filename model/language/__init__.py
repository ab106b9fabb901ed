"""The frozen language model: soft tokens and a prompt in, text out; what tells the families apart."""

from model.language.language_model import LanguageModel
from model.language.model_family import DecodingState, Extent, Rows

__all__ = ["DecodingState", "Extent", "LanguageModel", "Rows"]
