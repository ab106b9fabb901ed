"""The first level: tensors in this process, least recently used out first, bounded in bytes."""

import threading
from collections import OrderedDict

from torch import Tensor

from service.engine.request import Kind

_OVERHEAD_BYTES = 512  # of one entry beside its numbers: key, tensor object, table slot


class MemoryCache:
    """Holds at most `max_bytes`; 0 holds nothing. The tensors are shared and must not be written to.

    Locked, for the event loop reads it before the line and the engine reads and fills it; the lock is held
    for a look-up, never for a copy.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[tuple[str, Kind], Tensor] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def get(self, digest: str, kind: Kind) -> Tensor | None:
        """Gives what is kept of this image, or None; counts as a use."""
        with self._lock:
            tensor = self._entries.get((digest, kind))
            if tensor is not None:
                self._entries.move_to_end((digest, kind))
            return tensor

    def put(self, digest: str, kind: Kind, tensor: Tensor) -> None:
        """Keeps a CPU tensor that owns its storage; one larger than the whole cache is not kept."""
        size = _size(tensor)
        if size > self._max_bytes:
            return
        with self._lock:
            replaced = self._entries.pop((digest, kind), None)
            self._num_bytes += size - (0 if replaced is None else _size(replaced))
            self._entries[(digest, kind)] = tensor
            while self._num_bytes > self._max_bytes:
                _, dropped = self._entries.popitem(last=False)
                self._num_bytes -= _size(dropped)


def _size(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() + _OVERHEAD_BYTES
