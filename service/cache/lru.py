"""The first tier: tensors in this process, least recently used out first, bounded in bytes."""

import threading
from typing import Final

from cachetools import LRUCache
from torch import Tensor

from model import EmbeddingKind

_OVERHEAD_BYTES: Final = 512  # of one entry beside its numbers: key, tensor object, table slot


class LruTier:
    """Holds at most `max_bytes`; 0 holds nothing. The tensors are shared and must not be written to.

    Locked: the event loop reads it before the queue, and the engine reads and fills it. The lock is held
    for a look-up, never for a copy.
    """

    def __init__(self, max_bytes: int) -> None:
        self._entries: LRUCache[tuple[str, EmbeddingKind], Tensor] = LRUCache(max_bytes, getsizeof=_num_bytes)
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        return int(self._entries.currsize)

    def get(self, digest: str, kind: EmbeddingKind) -> Tensor | None:
        """Return what is kept of this image, or None; counts as a use."""
        with self._lock:
            return self._entries.get((digest, kind))

    def put(self, digest: str, kind: EmbeddingKind, tensor: Tensor) -> None:
        """Keep a CPU tensor that owns its storage; one larger than the whole cache is not kept."""
        with self._lock:
            if _num_bytes(tensor) <= self._entries.maxsize:
                self._entries[digest, kind] = tensor


def _num_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() + _OVERHEAD_BYTES
