"""The context of each HTTP request, and the middleware that writes it into headers, metrics and the log."""

import asyncio
import logging
import math
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.responses import problem_response
from service.errors import (
    MAX_ECHOED,
    AmbiguousLengthError,
    HeadersTooLargeError,
    ServiceError,
    ShedError,
    TooManyConnectionsError,
    UnknownPathError,
    echo_value,
)
from service.request_ids import REQUEST_IDS
from service.runtime.connection_pool import Access
from service.runtime.connections import ACCESS
from service.runtime.logs import FIELDS
from service.runtime.metrics import OTHER_ROUTE, PROBES, ROUTES, Metrics
from service.runtime.readiness import Readiness, Traffic, UploadLease

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER: Final = "X-Request-ID"
_WELL_FORMED_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+/=@-]{0,127}", re.ASCII)
_AUTHORITY: Final = re.compile(r"https?://[^/]+", re.IGNORECASE)
EXPOSED_HEADERS: Final = (REQUEST_ID_HEADER, "Server-Timing", "Retry-After")
CONTENT_TYPE_OPTIONS: Final = {"X-Content-Type-Options": "nosniff"}
_STATE_KEY: Final = "context"
_MAX_HEADERS, _MAX_HEADER_BYTES = 100, 32 * 1024
_RETRY_S: Final = 5
_MAX_UNREAD_BYTES: Final = 2**20  # of a body, read and discarded after the answer
_LINGER_S: Final = 2.0


@dataclass(slots=True)
class RequestContext:
    """The record of one HTTP request for headers, metrics and the log.

    arrived: on the monotonic clock. timings_ms, rows: of the answers so far.

    image_cached: whether all its images were cached; None where it had none.
    lease: of its body, if it has one.
    """

    request_id: str
    arrived: float = field(default_factory=time.monotonic)
    timings_ms: dict[str, float] = field(default_factory=dict)
    rows: int = 0
    image_cached: bool | None = None
    lease: UploadLease | None = None

    def total_ms(self) -> float:
        return round((time.monotonic() - self.arrived) * 1000, 3)

    def server_timing(self) -> str:
        """Return the value of the Server-Timing header."""
        timings = {**self.timings_ms, "total": self.total_ms()}
        entries = [f"{stage};dur={milliseconds:.3f}" for stage, milliseconds in timings.items()]
        return ", ".join([*entries, *(['cache;desc="hit"'] if self.image_cached else [])])


def context_of(request: Request) -> RequestContext:
    """Return the context the middleware made for this request."""
    context: RequestContext = request.scope["state"][_STATE_KEY]
    return context


class ContextMiddleware:
    """Adds the context to each request, X-Request-ID and Server-Timing to each answer, and a line to the log.

    While the service drains, answers ask clients to close their connections.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, traffic: Traffic, readiness: Readiness, root_path: str
    ) -> None:
        self._app = app
        self._root_path = root_path
        self._metrics = metrics
        self._traffic = traffic
        self._readiness = readiness

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _drop_authority(scope)
        _set_root_path(scope, self._root_path)
        context = RequestContext(_request_id(Headers(scope=scope)))
        REQUEST_IDS.set((context.request_id,))  # in the context of this request's task, and its children's
        scope.setdefault("state", {})[_STATE_KEY] = context
        status = 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._add_headers(MutableHeaders(scope=message), context)
            await send(message)

        self._traffic.enter()
        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            self._traffic.leave()
            if context.lease is not None:
                context.lease.close()
            self._record(scope, status, context)

    def _add_headers(self, headers: MutableHeaders, context: RequestContext) -> None:
        headers[REQUEST_ID_HEADER] = context.request_id
        headers["Server-Timing"] = context.server_timing()
        headers.setdefault("Cache-Control", "no-store")
        headers.update(CONTENT_TYPE_OPTIONS)
        if self._readiness.is_draining:
            headers["Connection"] = "close"

    def _record(self, scope: Scope, status: int, context: RequestContext) -> None:
        path = path_of(scope)
        is_preflight = scope["method"] == "OPTIONS"
        route = path if path in ROUTES and not is_preflight else OTHER_ROUTE
        total_ms = context.total_ms()
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.request_seconds.labels(route).observe(total_ms / 1000)
        fields = {
            "request_id": context.request_id,
            "method": scope["method"][:MAX_ECHOED],
            "path": path[:MAX_ECHOED],
            "status": status,
            "timings_ms": {**context.timings_ms, "total": total_ms},
            "rows": context.rows,
        }
        # Probes and scrapes come every few seconds.
        level = logging.INFO if route in ROUTES else logging.DEBUG
        logger.log(level, "request", extra={FIELDS: fields})


class LingerMiddleware:
    """Ends the connection after an answer that leaves much of the body unread, or its length unknown.

    Such a caller is still sending. It is told by `Connection: close`, and has a while to read the answer,
    because a connection that is closed at once is reset and may lose it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        unread = math.inf if "transfer-encoding" in headers else int(headers.get("content-length", 0))
        lingers = False

        async def receive_and_count() -> Message:
            nonlocal unread
            message = await receive()
            if message["type"] == "http.request":
                unread = unread - len(message.get("body", b"")) if message.get("more_body") else 0
            elif message["type"] == "http.disconnect":
                unread = 0
            return message

        async def send_and_stay(message: Message) -> None:
            nonlocal lingers
            if message["type"] == "http.response.start":
                lingers = unread > _MAX_UNREAD_BYTES
                if lingers:
                    MutableHeaders(scope=message)["Connection"] = "close"
            elif lingers:
                message = {**message, "more_body": True}
            await send(message)

        await self._app(scope, receive_and_count, send_and_stay)
        if lingers:
            await asyncio.sleep(_LINGER_S)
            await send({"type": "http.response.body"})


class RefusalMiddleware:
    """Answers requests that go no further, by their headers and their connection alone."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = _refusal(scope) if scope["type"] == "http" else None
        if isinstance(refusal, ShedError):
            self._metrics.shed.labels(refusal.code).inc()
        app = (
            self._app if refusal is None else problem_response(refusal, context_of(Request(scope)).request_id)
        )
        await app(scope, receive, send)


def _drop_authority(scope: Scope) -> None:
    """Reduce a target in absolute form, as for a proxy, to its path (RFC 9112, 3.2.2)."""
    if absolute := _AUTHORITY.match(scope["path"]):
        scope["path"] = scope["path"][absolute.end() :] or "/"


def _set_root_path(scope: Scope, root_path: str) -> None:
    """Note the prefix that a proxy puts before all paths, whether it leaves it in the path or not."""
    scope["root_path"] = root_path or scope.get("root_path", "")
    if scope["path"] == scope["root_path"]:
        scope["path"] += "/"


def path_of(scope: Scope) -> str:
    """Return the path of a request without the prefix of the proxy."""
    path: str = scope["path"]
    prefix: str = scope["root_path"]
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path


def _request_id(headers: Headers) -> str:
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _WELL_FORMED_ID.fullmatch(given) else uuid.uuid4().hex


def _refusal(scope: Scope) -> ServiceError | None:
    """Return why a request goes no further, by its headers and its connection alone."""
    names = [name for name, _ in scope["headers"]]
    num_bytes = sum(len(name) + len(value) for name, value in scope["headers"])
    if len(names) > _MAX_HEADERS or num_bytes > _MAX_HEADER_BYTES:
        return HeadersTooLargeError(
            f"the request has {len(names)} headers of {num_bytes} bytes, the limits are {_MAX_HEADERS} and "
            f"{_MAX_HEADER_BYTES}; send fewer"
        )
    if b"transfer-encoding" in names and b"content-length" in names:
        return AmbiguousLengthError(
            "the request has a Transfer-Encoding and a Content-Length; send one of them"
        )
    access = scope["state"].get(ACCESS, Access.FULL)
    path = path_of(scope)
    if access is Access.FULL or path in PROBES:
        return None
    if access is Access.PROBE_PORT:
        return UnknownPathError(f"{echo_value(path)} is not served on this port, for probes only")
    return TooManyConnectionsError(
        "too many connections are open, and all are busy; send it again after the time in Retry-After",
        retry_after_s=_RETRY_S,
    )
