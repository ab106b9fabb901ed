"""The first tier: tensors in this process, least recently used out first, bounded in bytes."""

import threading
from typing import Final

from cachetools import LRUCache
from torch import Tensor

from model import EmbeddingKind

BULK_SHARE: Final = 0.25  # of the bytes, for requests of many images
_Entries = LRUCache[tuple[str, EmbeddingKind], Tensor]
_OVERHEAD_BYTES: Final = 512  # of one entry beside its numbers: key, tensor object, table slot


class LruTier:
    """Holds at most `max_bytes`; 0 holds nothing. The tensors are shared and must not be written to.

    Requests of many images (is_bulk) share a quarter of it, so that they cannot drive out what others use. A
    hit by another request moves an entry to the rest. What the quarter does not use, the rest may.

    Locked: the event loop reads it before the queue, and the engine reads and fills it. The lock is held
    for a look-up, never for a copy.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries = _Entries(max_bytes, getsizeof=_num_bytes)
        self._bulk = _Entries(int(max_bytes * BULK_SHARE), getsizeof=_num_bytes)
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        return int(self._entries.currsize + self._bulk.currsize)

    def get(self, digest: str, kind: EmbeddingKind, *, is_bulk: bool = False) -> Tensor | None:
        """Return what is kept of this image, or None; counts as a use."""
        with self._lock:
            found = self._entries.get((digest, kind))
            if found is None:
                found = self._bulk.get((digest, kind))
                if found is not None and not is_bulk:
                    self._put((digest, kind), found, is_bulk=False)
            return found

    def put(self, digest: str, kind: EmbeddingKind, tensor: Tensor, *, is_bulk: bool = False) -> None:
        """Keep a CPU tensor that owns its storage; one larger than its part of the cache is not kept."""
        with self._lock:
            self._put((digest, kind), tensor, is_bulk=is_bulk and (digest, kind) not in self._entries)

    def _put(self, key: tuple[str, EmbeddingKind], tensor: Tensor, *, is_bulk: bool) -> None:
        target, other = (self._bulk, self._entries) if is_bulk else (self._entries, self._bulk)
        if _num_bytes(tensor) > target.maxsize:
            return
        other.pop(key, None)
        target[key] = tensor
        while self.num_bytes > self._max_bytes:
            other.popitem()


def _num_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() + _OVERHEAD_BYTES
