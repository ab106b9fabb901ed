"""Interfaces of the engine to its surroundings: its metrics, and the cache of embeddings."""

from typing import Protocol

from torch import Tensor

from model import EmbeddingKind


class EngineMetrics(Protocol):
    """Counters of the engine, called from its thread. stage: "vision", "qformer", "decode" or "match"."""

    def observe_batch(self, stage: str, num_rows: int) -> None:
        """Record the rows of one batch."""

    def observe_padding(self, ratio: float) -> None:
        """Record the share of padding in one prefill batch, in [0, 1]."""

    def add_device_seconds(self, stage: str, seconds: float) -> None:
        """Add the duration of one step; the Q-Former's time counts as "vision"."""

    def count_out_of_memory(self, stage: str) -> None:
        """Count a batch that did not fit into the device's memory."""


class LocalEmbeddingCache(Protocol):
    """The in-process embedding cache. Its tensors lie on the CPU and are never written to.

    is_bulk: for a request of many images, which takes at most a share of the cache.
    """

    def get(self, digest: str, kind: EmbeddingKind, *, is_bulk: bool = False) -> Tensor | None: ...

    def put(self, digest: str, kind: EmbeddingKind, tensor: Tensor, *, is_bulk: bool = False) -> None: ...
