"""Connections within a limit: slow and idle ones are closed, so that a request always finds one.

Every connection is busy with a whole request, or waits for bytes. At the limit, the one that has waited
longest makes room. If all are busy, a few more still answer probes, and refuse the rest with 503.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, Final, Protocol

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

ACCESS: Final = "access"  # the key of `Access` in the state of an ASGI scope
_HEADER_TIMEOUT_S: Final = 10.0  # from accept, or from the first byte on a kept connection
_SWEEP_S: Final = 1.0
_REPORT_S: Final = 60.0
_MAX_DISCARDED_BYTES: Final = 2**20  # of a body whose request is answered
_LINGER_S: Final = 2.0  # for the caller to read why its body is not read any more
_NUM_EXTRA: Final = 16  # beyond the limit, for probes
MAX_PROBE_CONNECTIONS: Final = 32  # on the port of their own
# Files beside connections: weights, Redis, worker processes, and those accepted but not yet counted.
_OTHER_FILES: Final = 128
KEEP_ALIVE_S: Final = 75  # longer than the 60 s of common proxies, so that it is they who close


class Access(Enum):
    """The routes that a connection may use."""

    FULL = auto()
    PROBE_PORT = auto()  # probes, /version and /metrics, on their own port
    EXTRA = auto()  # the same, because too many connections are busy


class Rejection(Protocol):
    """An answer to bytes that are no HTTP; a Starlette response."""

    status_code: int
    body: bytes | memoryview
    raw_headers: list[tuple[bytes, bytes]]


class ConnectionPool:
    """The connections of one port. access: what they may use. For the event loop."""

    def __init__(self, limit: int, access: Access, *, num_extra: int = 0) -> None:
        self._limit = limit
        self._access = access
        self._num_extra = num_extra
        self._open: set[BoundedProtocol] = set()
        # Those that wait: for the first byte of the first or of another request, for the rest of a head, for
        # more of a body. Each since when, oldest first.
        self._new: dict[BoundedProtocol, float] = {}
        self._kept: dict[BoundedProtocol, float] = {}
        self._in_head: dict[BoundedProtocol, float] = {}
        self._in_body: dict[BoundedProtocol, float] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._num_closed = 0
        self._reported_at = -_REPORT_S

    def admit(self, connection: "BoundedProtocol") -> bool:
        """Count a new connection; False where there is not even room to refuse its request."""
        if len(self._open) >= self._limit:
            self._close_longest_waiting()
        if len(self._open) >= self._limit + self._num_extra:
            return False
        self._open.add(connection)
        self._new[connection] = time.monotonic()
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)
        return True

    def remove(self, connection: "BoundedProtocol") -> None:
        self._open.discard(connection)
        self._end_wait(connection)

    def access(self) -> Access:
        """Return what a request that comes now may use."""
        return self._access if len(self._open) <= self._limit else Access.EXTRA

    def note_bytes(self, connection: "BoundedProtocol") -> None:
        """Begin the time for the head of a request, where these are its first bytes."""
        if connection in self._new or connection in self._kept:
            self._end_wait(connection)
            self._in_head[connection] = time.monotonic()

    def update(self, connection: "BoundedProtocol") -> None:
        """Note whether a connection is busy with a whole request, or for what it waits."""
        if connection not in self._open:
            return
        if connection.awaits_body:
            self._end_wait(connection)
            self._in_body[connection] = time.monotonic()  # since its last byte
        elif connection.is_busy:
            self._end_wait(connection)
        elif connection not in self._in_head and connection not in self._new:
            self._in_body.pop(connection, None)
            self._kept.setdefault(connection, time.monotonic())

    def _end_wait(self, connection: "BoundedProtocol") -> None:
        for group in (self._new, self._kept, self._in_head, self._in_body):
            group.pop(connection, None)

    def _close_longest_waiting(self) -> None:
        waiting = [group for group in (self._new, self._kept, self._in_head, self._in_body) if group]
        if waiting:
            oldest = min(waiting, key=lambda group: next(iter(group.values())))
            self._close(next(iter(oldest)))
        self._num_closed += 1
        now = time.monotonic()
        if now - self._reported_at >= _REPORT_S:
            logger.warning(
                "the limit of %d connections is reached (BLIP2_MAX_CONNECTIONS, open files): "
                "%d were closed or refused since the last report",
                self._limit,
                self._num_closed,
            )
            self._reported_at, self._num_closed = now, 0

    def _sweep(self) -> None:
        now = time.monotonic()
        for group, timeout_s in (
            (self._new, _HEADER_TIMEOUT_S),
            (self._kept, KEEP_ALIVE_S),
            (self._in_head, _HEADER_TIMEOUT_S),
        ):
            for connection in [each for each, since in group.items() if now - since >= timeout_s]:
                self._close(connection)
        is_empty = not self._open
        self._sweeper = None if is_empty else asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    def _close(self, connection: "BoundedProtocol") -> None:
        self.remove(connection)
        connection.transport.abort()  # not closed: a peer that does not read would keep it open


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 on one connection of a pool.

    pool_of: returns the pool of a port. reject: builds the answer to bytes that are no HTTP; its argument is
    the request id.
    """

    def __init__(
        self,
        *args: Any,
        pool_of: Callable[[int | None], ConnectionPool],
        reject: Callable[[str], Rejection],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._pool_of = pool_of
        self._reject = reject
        self._lifespan_state = self.app_state
        self._num_discarded = 0

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

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_discarding(len(data)):
            return
        self._pool.note_bytes(self)
        self.app_state = {**self._lifespan_state, ACCESS: self._pool.access()}
        super().data_received(data)
        self._pool.update(self)

    def _is_discarding(self, num_bytes: int) -> bool:
        """Stop reading, and close later, where much of a body follows though its request is answered."""
        if self._has_request or self.cycle is None or self.conn.their_state is not h11.SEND_BODY:
            return False
        self._num_discarded += num_bytes
        if self._num_discarded <= _MAX_DISCARDED_BYTES:
            return False
        self.flow.pause_reading()
        self.loop.call_later(_LINGER_S, self.transport.abort)
        return True

    def on_response_complete(self) -> None:
        self._num_discarded = 0
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


def limit_connections(max_connections: int) -> int:
    """Return how many connections the limit of open files allows, which is raised as far as may be.

    Raises ValueError where there is room for none.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return max_connections
    others = _OTHER_FILES + _NUM_EXTRA + MAX_PROBE_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return max_connections
    needed = max_connections + others
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft <= others:
        raise ValueError(f"the limit of open files is {soft}, and {others} are needed; raise it (ulimit -n)")
    return min(max_connections, soft - others)


def build_pools(max_connections: int, probe_port: int | None) -> Callable[[int | None], ConnectionPool]:
    """Return the function that returns the pool of a port."""
    main = ConnectionPool(max_connections, Access.FULL, num_extra=_NUM_EXTRA)
    probes = ConnectionPool(MAX_PROBE_CONNECTIONS, Access.PROBE_PORT)
    return lambda port: probes if probe_port is not None and port == probe_port else main
