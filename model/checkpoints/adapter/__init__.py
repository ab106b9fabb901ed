"""Adapters, the format of this project."""

from model.checkpoints.adapter.config import FORMAT, AdapterConfig
from model.checkpoints.adapter.load import (
    ADAPTER,
    TIED_HEAD,
    find_frozen_model,
    find_retrieval_model,
    load_adapter,
)
from model.checkpoints.adapter.save import save_generation_adapter, save_retrieval_adapter

__all__ = [
    "ADAPTER",
    "FORMAT",
    "TIED_HEAD",
    "AdapterConfig",
    "find_frozen_model",
    "find_retrieval_model",
    "load_adapter",
    "save_generation_adapter",
    "save_retrieval_adapter",
]
