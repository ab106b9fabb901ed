"""Loaders of the frozen models: image encoder, language model and tokenizers."""

from model.checkpoints.frozen.language_model import LANGUAGE_PREFIX, load_language_model
from model.checkpoints.frozen.tokenizer import load_text_tokenizer
from model.checkpoints.frozen.vision_model import (
    BLIP2_VISION,
    FINAL_NORM_PREFIX,
    VISION_PREFIX,
    assemble_vision_model,
    load_vision_model,
    read_vision_config,
    resize_vision_model,
)

__all__ = [
    "BLIP2_VISION",
    "FINAL_NORM_PREFIX",
    "LANGUAGE_PREFIX",
    "VISION_PREFIX",
    "assemble_vision_model",
    "load_language_model",
    "load_text_tokenizer",
    "load_vision_model",
    "read_vision_config",
    "resize_vision_model",
]
