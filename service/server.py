"""The process around the application: signals, draining, exit."""

import asyncio
import os
import socket
import sys
from functools import partial
from types import FrameType
from typing import NoReturn

import uvicorn

from service.api.app import create_app
from service.model_backend import Backend
from service.runtime.lifecycle import EngineLostError, FatalError, Lifecycle, Loader
from service.runtime.listener import BACKLOG
from service.runtime.loading import load_backend
from service.runtime.logs import configure_logs
from service.runtime.settings import Settings

_KEEP_ALIVE_S = 75  # longer than the 60 s of common proxies, so that it is they who close
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


def serve(settings: Settings, listener: socket.socket, load: Loader | None = None) -> None:
    """Serve on a listening socket until a signal. Raises FatalError where it cannot serve, or no longer.

    load: returns the model; None: the one the settings name.
    """
    configure_logs(settings.log_level)
    server = _build_server(settings, listener, load or partial(load_backend, settings))
    server.run(sockets=[listener])
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


def _build_server(settings: Settings, listener: socket.socket, load: Loader) -> Server:
    def fail(failure: FatalError) -> None:
        server.fail(failure)

    app = create_app(
        settings,
        load,
        on_ready=partial(_print_ready, listener),
        on_failure=fail,
    )
    config = uvicorn.Config(
        app,
        http="h11",  # what the benchmarks ran with; parsing takes no share of the time beside a model
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_LAST_CONNECTIONS_S,
    )
    server = Server(config, app.state.lifecycle)
    return server


def _print_ready(listener: socket.socket, backend: Backend) -> None:
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    sys.stdout.write(f"serving {backend.name} on http://{host}:{port} (docs: /docs)\n")
    sys.stdout.flush()
