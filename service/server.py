"""The process around the application: signals, draining, exit."""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import NoReturn, cast

import uvicorn
from starlette.responses import Response

from service.api.app import create_app
from service.api.middleware import CONTENT_TYPE_OPTIONS, REQUEST_ID_HEADER
from service.api.responses import problem_response
from service.errors import InvalidHttpError
from service.model_backend import Backend
from service.runtime.chunk_limit import MAX_TINY_CHUNKS, TINY_BYTES
from service.runtime.connection_pool import KEEP_ALIVE_S, Access, ConnectionPool
from service.runtime.connections import BoundedProtocol
from service.runtime.lifecycle import EngineLostError, FatalError, Lifecycle, Loader, StartupError
from service.runtime.listener import (
    BACKLOG,
    MAX_PROBE_CONNECTIONS,
    NUM_EXTRA,
    accept_backlog,
    limit_connections,
)
from service.runtime.loading import load_backend
from service.runtime.logs import configure_logs
from service.runtime.settings import Settings

logger = logging.getLogger(__name__)

_LAST_CONNECTIONS_S = 5


class Server(uvicorn.Server):
    """Drains before it closes the listener: SIGTERM or SIGINT begins it, a second one exits at once."""

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle) -> None:
        super().__init__(config)
        self._lifecycle = lifecycle
        self._draining: asyncio.Task[None] | None = None
        self.failure: FatalError | None = None

    def handle_exit(self, _sig: int, _stack_frame: FrameType | None) -> None:
        # Not remembered as uvicorn does, which would raise the signal again at the end: the exit code is 0.
        asyncio.get_running_loop().call_soon_threadsafe(self._begin_exit)

    @property
    def is_loading(self) -> bool:
        return self._lifecycle.is_loading

    def fail(self, failure: FatalError) -> None:
        """Stop the server, because it cannot serve."""
        self.failure = failure
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the listeners, answer whoever has connected, and end the application."""
        # Whoever connected before a listener closes, and was not accepted, would be reset with its request.
        backlog = [connection for listener in sockets or [] for connection in accept_backlog(listener)]
        for server in self.servers:
            server.close()
        for connection in backlog:
            await asyncio.get_running_loop().connect_accepted_socket(self._build_protocol, connection)
        await super().shutdown(sockets)

    def _build_protocol(self) -> asyncio.Protocol:
        build = cast("Callable[..., asyncio.Protocol]", self.config.http_protocol_class)
        return build(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    def _begin_exit(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain(), name="drain")
        else:
            _exit_now("ended by a second signal")

    async def _drain(self) -> None:
        try:
            await self._lifecycle.drain()
        finally:
            self.should_exit = True


def serve(
    settings: Settings,
    listener: socket.socket,
    load: Loader | None = None,
    *,
    probe_listener: socket.socket | None = None,
) -> None:
    """Serve on a listening socket until a signal. Raises FatalError where it cannot serve, or no longer.

    load: returns the model; None: the one the settings name. probe_listener: another socket, for probes and
    metrics alone.
    """
    configure_logs(settings.log_level)
    server = _build_server(settings, listener, probe_listener, load or partial(load_backend, settings))
    server.run(sockets=[listener, probe_listener] if probe_listener else [listener])
    if isinstance(server.failure, EngineLostError):
        _exit_now(str(server.failure))
    if server.failure is not None:
        raise server.failure
    if server.is_loading:
        os._exit(0)  # the interpreter's own end would abort while the loader's thread is inside torch


def _exit_now(reason: str) -> NoReturn:
    sys.stderr.write(f"blip2: {reason}\n")
    sys.stderr.flush()
    os._exit(1)  # the interpreter's own end would wait for threads, and perhaps for a device that hangs


def _build_server(
    settings: Settings, listener: socket.socket, probe_listener: socket.socket | None, load: Loader
) -> Server:
    def fail(failure: FatalError) -> None:
        server.fail(failure)

    def is_stopping() -> bool:
        return server.should_exit

    app = create_app(
        settings,
        load,
        on_ready=partial(_print_ready, listener),
        on_failure=fail,
    )
    protocol = partial(
        BoundedProtocol,
        pool_of=_build_pools(settings, probe_listener),
        reject=_reject,
        is_stopping=is_stopping,
    )
    config = uvicorn.Config(
        app,
        http=cast("type[asyncio.Protocol]", protocol),  # called with arguments only
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=_LAST_CONNECTIONS_S,
    )
    server = Server(config, app.state.lifecycle)
    return server


def _build_pools(
    settings: Settings, probe_listener: socket.socket | None
) -> Callable[[int | None], ConnectionPool]:
    try:
        max_connections = limit_connections(settings.max_connections)
    except ValueError as exc:
        raise StartupError(str(exc)) from exc
    if max_connections < settings.max_connections:
        logger.warning(
            "at most %d connections, since the limit of open files is low (ulimit -n)", max_connections
        )
    pool = ConnectionPool(max_connections, Access.FULL, num_extra=NUM_EXTRA)
    if probe_listener is None:
        return lambda _: pool
    probe_pool = ConnectionPool(MAX_PROBE_CONNECTIONS, Access.PROBE_PORT)
    probe_port = probe_listener.getsockname()[1]
    return lambda port: probe_pool if port == probe_port else pool


def _reject(request_id: str) -> Response:
    error = InvalidHttpError(
        "the bytes on this connection are no HTTP/1.1 request, or the body comes in more than "
        f"{MAX_TINY_CHUNKS} chunks of fewer than {TINY_BYTES} bytes; check the client"
    )
    return problem_response(error, request_id, {REQUEST_ID_HEADER: request_id, **CONTENT_TYPE_OPTIONS})


def _print_ready(listener: socket.socket, backend: Backend) -> None:
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    sys.stdout.write(f"serving {backend.name} on http://{host}:{port} (docs: /docs)\n")
    sys.stdout.flush()
