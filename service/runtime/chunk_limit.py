"""A limit on tiny chunks of a body: each costs the event loop 10 µs, so 256 KB byte by byte 3 s."""

from typing import Final

import h11

MAX_TINY_CHUNKS: Final = 250  # of a body whose chunks have fewer than TINY_BYTES bytes on average
TINY_BYTES: Final = 128


class ChunkLimit(h11.Connection):
    """One side of an HTTP/1.1 connection, which refuses bodies in very many tiny chunks."""

    _num_chunks = _num_bytes = 0  # of the present body

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Return the next event. Raises h11.RemoteProtocolError for what is no HTTP, and for tiny chunks."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_chunks = self._num_bytes = 0
        elif isinstance(event, h11.Data):
            self._num_chunks += event.chunk_end
            self._num_bytes += len(event.data)
            if self._num_chunks > MAX_TINY_CHUNKS and self._num_bytes < TINY_BYTES * self._num_chunks:
                raise h11.RemoteProtocolError("the chunks of the body are too small")
        return event
