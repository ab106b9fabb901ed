"""BLIP-2: tensors in, tensors or text out. Knows nothing of HTTP, environment, service or training."""

from model.blip2 import Blip2
from model.errors import (
    CheckpointError,
    InvalidParamsError,
    InvalidPromptError,
    ModelError,
    TaskUnavailableError,
)
from model.generation import DecodeJob, Decoder, DecoderLimits, Generation, GenerationParams

__all__ = [
    "Blip2",
    "CheckpointError",
    "DecodeJob",
    "Decoder",
    "DecoderLimits",
    "Generation",
    "GenerationParams",
    "InvalidParamsError",
    "InvalidPromptError",
    "ModelError",
    "TaskUnavailableError",
]
