"""The application: routes, middleware, and the one place where errors become answers."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib.metadata import version

from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from model import ModelError
from service.api import openapi
from service.api.health import DISTRIBUTION, HealthRoutes
from service.api.middleware import REQUEST_ID_HEADER, ContextMiddleware, Traffic, context_of
from service.api.responses import Problem
from service.api.routes import InferenceRoutes
from service.errors import (
    ClientGoneError,
    DeadlineExceededError,
    MethodNotAllowedError,
    ServiceError,
    ShedError,
    UnknownPathError,
    UnreadableBodyError,
    for_caller,
)
from service.model_backend import Backend
from service.runtime.lifecycle import FatalError, Lifecycle, Loader
from service.runtime.metrics import Metrics
from service.runtime.settings import Settings

_DESCRIPTION = """Captions, answers to questions, and retrieval with BLIP-2.

Errors are `application/problem+json`; their messages name the value, the limit and the cure. A budget of
milliseconds may be sent as `X-Request-Timeout-Ms`; past it the answer is 504 and the work is dropped.
Every answer carries `X-Request-ID`, the caller's own where it is well-formed, and `Server-Timing`."""


def create_app(
    settings: Settings,
    load: Loader,
    *,
    on_ready: Callable[[Backend], None] = lambda _: None,
    on_failure: Callable[[FatalError], None] = lambda _: None,
) -> FastAPI:
    """Gives the application; it loads the model in the background once it is started.

    load: loads the model; called in a thread of its own. on_ready, on_failure: as `Lifecycle` has them.
    `app.state.lifecycle` is the one to drain.
    """
    metrics, traffic = Metrics(), Traffic()
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
        redoc_url=None,
    )
    app.state.lifecycle = lifecycle
    app.include_router(InferenceRoutes(settings, lifecycle).router())
    app.include_router(HealthRoutes(lifecycle, metrics).router())
    app.add_api_route("/", _home, include_in_schema=False)
    app.add_middleware(
        ContextMiddleware, metrics=metrics, traffic=traffic, closing=lambda: lifecycle.draining
    )
    _add_error_handlers(app, metrics)
    openapi.install(app)
    return app


async def _home() -> RedirectResponse:
    return RedirectResponse("/docs")


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    async def answer(request: Request, exc: Exception) -> Response:
        error = _to_service_error(request, exc)
        if isinstance(error, ShedError):
            metrics.shed.labels(error.code).inc()
        elif isinstance(error, DeadlineExceededError):
            metrics.abandoned.labels("deadline").inc()
        elif isinstance(error, ClientGoneError):
            metrics.abandoned.labels("disconnected").inc()
        return _problem(request, error, exc)

    for kind in (ServiceError, ModelError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, answer)


def _to_service_error(request: Request, exc: Exception) -> ServiceError:
    if isinstance(exc, ClientDisconnect):
        return ClientGoneError("the client closed the connection before its request was whole")
    if isinstance(exc, HTTPException):
        return _from_http(request, exc)
    if isinstance(exc, ServiceError | ModelError):
        return for_caller(exc)
    return ServiceError("an internal error; the log of the service says how, by the request id")


def _from_http(request: Request, exc: HTTPException) -> ServiceError:
    if exc.status_code == HTTPStatus.NOT_FOUND:
        return UnknownPathError(f"{request.url.path[:128]!r} is not a path of this service; see /docs")
    if exc.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (exc.headers or {}).get("Allow", "")
        return MethodNotAllowedError(f"{request.method} is not allowed here; use {allowed}")
    return UnreadableBodyError(f"the body cannot be read: {exc.detail}; check how it is encoded")


def _problem(request: Request, error: ServiceError, exc: Exception) -> Response:
    context = context_of(request)
    headers = {
        # An unforeseen error is answered outside the middleware that would add these two.
        REQUEST_ID_HEADER: context.request_id,
        "Server-Timing": context.server_timing(),
        **(dict(exc.headers or {}) if isinstance(exc, HTTPException) else {}),
        **({} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}),
    }
    return Response(
        Problem.of(error, context.request_id).model_dump_json(exclude_none=True),
        status_code=error.status,
        headers=headers,
        media_type="application/problem+json",
    )
