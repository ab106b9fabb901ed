"""HTTP/1.1 on a connection of a pool: uvicorn's protocol, within limits."""

import asyncio
import uuid
from collections.abc import Callable
from typing import Any, Final

import h11
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.runtime.chunk_limit import ChunkLimit
from service.runtime.connection_pool import ConnectionPool

ACCESS: Final = "access"  # the key of `Access` in the state of an ASGI scope
_MAX_HEAD_BYTES: Final = 2**16
_FIRST_REQUEST_S: Final = 2.0  # for the request of a connection that was made just before the service stops


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 on one connection of a pool.

    pool_of: returns the pool of a port. reject: builds the answer to bytes that are no HTTP; its argument is
    the request id. is_stopping: whether each connection has to end with its next answer.
    """

    def __init__(
        self,
        *args: Any,
        pool_of: Callable[[int | None], ConnectionPool],
        reject: Callable[[str], Response],
        is_stopping: Callable[[], bool],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.conn = ChunkLimit(h11.SERVER, _MAX_HEAD_BYTES)
        self._pool_of = pool_of
        self._reject = reject
        self._is_stopping = is_stopping
        self._lifespan_state = self.app_state

    @property
    def awaits_reader(self) -> bool:
        """Whether the caller has not read enough of an answer for more of it to be sent."""
        return self.flow.write_paused

    @property
    def awaits_body(self) -> bool:
        """Whether a part of the body is still to come."""
        return self._has_request and self.cycle.more_body

    @property
    def is_busy(self) -> bool:
        """Whether a whole request is not answered yet."""
        return self._has_request and not self.cycle.more_body

    @property
    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn does
        super().connection_made(transport)
        self._pool = self._pool_of(self.server[1] if self.server else None)
        if not self._pool.admit(self):
            transport.abort()
        elif self._is_stopping():
            self.shutdown()

    def shutdown(self) -> None:
        """End the connection with its answer; where it has had no request yet, with that to its first."""
        if self.cycle is None:
            self.loop.call_later(_FIRST_REQUEST_S, super().shutdown)
        else:
            super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._pool.note_bytes(self)
        self.app_state = {**self._lifespan_state, ACCESS: self._pool.access()}
        super().data_received(data)
        if self.cycle is not None and self._is_stopping():
            self.cycle.keep_alive = False
        self._pool.update(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._pool.update(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._pool.update(self)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._pool.update(self)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's text
        """Answer bytes that are no HTTP with a problem, unless an answer is under way, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = self._reject(uuid.uuid4().hex)
            head = h11.Response(
                status_code=answer.status_code, headers=answer.raw_headers, reason=b"Bad Request"
            )
            for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
