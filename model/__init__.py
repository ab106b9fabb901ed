"""BLIP-2: tensors in, tensors or text out. Independent of HTTP, environment, service and training."""

from model.blip2 import Blip2, EmbeddingKind
from model.errors import (
    CheckpointError,
    InvalidParamsError,
    InvalidPromptError,
    ModelError,
    TaskUnavailableError,
)
from model.generation import (
    Decoder,
    DecodeRequest,
    DecoderLimits,
    Generation,
    GenerationParams,
    check_fits,
    memory_requirement,
)
from model.language import LanguageModel, MemoryRequirement

__all__ = [
    "Blip2",
    "CheckpointError",
    "DecodeRequest",
    "Decoder",
    "DecoderLimits",
    "EmbeddingKind",
    "Generation",
    "GenerationParams",
    "InvalidParamsError",
    "InvalidPromptError",
    "LanguageModel",
    "MemoryRequirement",
    "ModelError",
    "TaskUnavailableError",
    "check_fits",
    "memory_requirement",
]
