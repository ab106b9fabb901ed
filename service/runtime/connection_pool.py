"""Pools of connections within a limit: slow and idle ones are closed, so that a request always finds one.

Every connection is busy with a whole request, or waits for its caller. At the limit, the one that has waited
longest makes room. If all are busy, a few more still answer probes, and refuse the rest with 503.
"""

import asyncio
import logging
import time
from enum import Enum, auto
from typing import Final, Protocol

logger = logging.getLogger(__name__)

KEEP_ALIVE_S: Final = 75  # longer than the 60 s of common proxies, so that it is they who close
_HEADER_TIMEOUT_S: Final = 10.0  # from accept, or from the first byte on a kept connection
_READ_TIMEOUT_S: Final = 30.0  # for the caller to make room, while more of an answer is to be sent
_SWEEP_S: Final = 1.0
_REPORT_S: Final = 60.0


class Access(Enum):
    """The routes that a connection may use."""

    FULL = auto()
    PROBE_PORT = auto()  # probes, /version and /metrics, on their own port
    EXTRA = auto()  # the same, because too many connections are busy


class Connection(Protocol):
    """A connection, as a pool sees it. awaits_reader, awaits_body, is_busy: see `BoundedProtocol`."""

    transport: asyncio.Transport

    @property
    def awaits_reader(self) -> bool: ...

    @property
    def awaits_body(self) -> bool: ...

    @property
    def is_busy(self) -> bool: ...


class ConnectionPool:
    """The connections of one port. access: what they may use. For the event loop."""

    def __init__(self, limit: int, access: Access, *, num_extra: int = 0) -> None:
        self._limit = limit
        self._access = access
        self._num_extra = num_extra
        self._open: set[Connection] = set()
        # Those that wait: for the first byte of the first or of another request, for the rest of a head, for
        # more of a body, for the caller to read. Each since when, oldest first.
        self._new: dict[Connection, float] = {}
        self._kept: dict[Connection, float] = {}
        self._in_head: dict[Connection, float] = {}
        self._in_body: dict[Connection, float] = {}
        self._unread: dict[Connection, float] = {}
        self._groups = (self._new, self._kept, self._in_head, self._in_body, self._unread)
        self._sweeper: asyncio.TimerHandle | None = None
        self._num_closed = 0
        self._reported_at = -_REPORT_S

    def admit(self, connection: Connection) -> bool:
        """Count a new connection; False where there is not even room to refuse its request."""
        while len(self._open) >= self._limit and any(self._groups):
            self._close_longest_waiting()
        if len(self._open) >= self._limit + self._num_extra:
            return False
        self._open.add(connection)
        self._new[connection] = time.monotonic()
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)
        return True

    def remove(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._end_wait(connection)

    def access(self) -> Access:
        """Return what a request that comes now may use."""
        return self._access if len(self._open) <= self._limit else Access.EXTRA

    def note_bytes(self, connection: Connection) -> None:
        """Begin the time for the head of a request, where these are its first bytes."""
        if connection in self._new or connection in self._kept:
            self._end_wait(connection)
            self._in_head[connection] = time.monotonic()

    def update(self, connection: Connection) -> None:
        """Note whether a connection is busy with a whole request, or for what it waits."""
        if connection not in self._open:
            return
        if connection.awaits_reader:
            since = self._unread.get(connection, time.monotonic())
            self._end_wait(connection)
            self._unread[connection] = since
        elif connection.awaits_body:
            self._end_wait(connection)
            self._in_body[connection] = time.monotonic()  # since its last byte
        elif connection.is_busy:
            self._end_wait(connection)
        elif connection not in self._in_head and connection not in self._new:
            since = self._kept.get(connection, time.monotonic())
            self._end_wait(connection)
            self._kept[connection] = since

    def _end_wait(self, connection: Connection) -> None:
        for group in self._groups:
            group.pop(connection, None)

    def _close_longest_waiting(self) -> None:
        waiting = [group for group in self._groups if group]
        oldest = min(waiting, key=lambda group: next(iter(group.values())))
        self._close(next(iter(oldest)))
        self._num_closed += 1
        if time.monotonic() - self._reported_at >= _REPORT_S:
            message = "%d connections are open, the limit (BLIP2_MAX_CONNECTIONS, open files): %d were closed"
            logger.warning(message, self._limit, self._num_closed)
            self._reported_at, self._num_closed = time.monotonic(), 0

    def _sweep(self) -> None:
        now = time.monotonic()
        limits = (
            (self._new, _HEADER_TIMEOUT_S),
            (self._in_head, _HEADER_TIMEOUT_S),
            (self._kept, KEEP_ALIVE_S),
            (self._unread, _READ_TIMEOUT_S),
        )
        for group, timeout_s in limits:
            for connection in [each for each, since in group.items() if now - since >= timeout_s]:
                self._close(connection)
        self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep) if self._open else None

    def _close(self, connection: Connection) -> None:
        self.remove(connection)
        connection.transport.abort()  # not closed: a peer that does not read would keep it open
