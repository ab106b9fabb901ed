"""BLIP-2: tensors in, tensors or text out. Independent of HTTP, environment, service and training.

The names are imported at their first use (PEP 562): whoever only reads image files does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from model.blip2 import Blip2, EmbeddingKind
    from model.errors import (
        CheckpointError,
        InvalidParamsError,
        InvalidPromptError,
        ModelError,
        NonFiniteError,
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
    "NonFiniteError",
    "TaskUnavailableError",
    "check_fits",
    "memory_requirement",
]

_MODULES: Final = {
    "blip2": ("Blip2", "EmbeddingKind"),
    "errors": (
        "CheckpointError",
        "InvalidParamsError",
        "InvalidPromptError",
        "ModelError",
        "NonFiniteError",
        "TaskUnavailableError",
    ),
    "generation": (
        "Decoder",
        "DecodeRequest",
        "DecoderLimits",
        "Generation",
        "GenerationParams",
        "check_fits",
        "memory_requirement",
    ),
    "language": ("LanguageModel", "MemoryRequirement"),
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
