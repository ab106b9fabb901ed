"""The application: routes, middleware and error handlers."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from service.api import errors_http, openapi
from service.api.docs_page import DocsRoutes
from service.api.health import DISTRIBUTION, HealthRoutes
from service.api.middleware import EXPOSED_HEADERS, ContextMiddleware, LingerMiddleware, RefusalMiddleware
from service.api.routes import InferenceRoutes
from service.model_backend import Backend
from service.runtime.lifecycle import FatalError, Lifecycle, Loader
from service.runtime.metrics import Metrics
from service.runtime.readiness import Traffic, Uploads
from service.runtime.settings import Settings

_DESCRIPTION = """Captions, answers to questions, and retrieval with BLIP-2.

Errors are `application/problem+json`; their messages name the value, the limit and the cure. A deadline in
milliseconds may be sent as `X-Request-Timeout-Ms`; past it the answer is 504 and the work is cancelled.
Every answer carries `X-Request-ID`, the caller's own where it is well-formed, and `Server-Timing`."""


def create_app(
    settings: Settings,
    load: Loader,
    *,
    on_ready: Callable[[Backend], None] = lambda _: None,
    on_failure: Callable[[FatalError], None] = lambda _: None,
) -> FastAPI:
    """Build the application; it loads the model in the background once it is started.

    load: loads the model; called in a thread of its own. on_ready, on_failure: see `Lifecycle`.
    `app.state.lifecycle` is the one to drain.
    """
    metrics, traffic, uploads = Metrics(), Traffic(), Uploads(settings.max_upload_bytes)
    metrics.upload_bytes.set_function(lambda: uploads.num_bytes)
    lifecycle = Lifecycle(settings, metrics, traffic, load, on_ready=on_ready, on_failure=on_failure)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        lifecycle.start()
        yield
        await lifecycle.aclose()

    app = FastAPI(
        title="BLIP-2",
        version=version(DISTRIBUTION),
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # the address in a redirect would be the caller's Host
    )
    app.state.lifecycle = lifecycle
    app.include_router(InferenceRoutes(settings, lifecycle.readiness, uploads, metrics).router())
    app.include_router(HealthRoutes(lifecycle.readiness, metrics).router())
    app.include_router(DocsRoutes(app.title).router())
    errors_http.install(app, metrics)
    openapi.install(app, settings)
    # Not by add_middleware: an unforeseen error would be answered outside of all these.
    stack: ASGIApp = RefusalMiddleware(app.build_middleware_stack(), metrics=metrics)
    if settings.allowed_origins:
        stack = _with_cors(stack, settings.allowed_origins)
    stack = ContextMiddleware(
        stack,
        metrics=metrics,
        traffic=traffic,
        readiness=lifecycle.readiness,
        root_path=settings.root_path or "",
    )
    app.middleware_stack = LingerMiddleware(stack)
    return app


def _with_cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Allow pages of these origins to send requests, and to read the answers and our headers."""
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=("*",),
        expose_headers=EXPOSED_HEADERS,
    )
