"""Errors to HTTP: the one place where an exception becomes a response."""

from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from model import ModelError
from service.api.middleware import context_of, path_of
from service.api.responses import problem_response
from service.errors import (
    ClientGoneError,
    DeadlineExceededError,
    MethodNotAllowedError,
    ServiceError,
    ShedError,
    UnknownPathError,
    UnreadableBodyError,
    echo,
    echo_value,
    for_caller,
)
from service.runtime.metrics import PROBES, Metrics


def install(app: FastAPI, metrics: Metrics) -> None:
    """Register the handlers of all errors."""

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
    return ServiceError("an internal error; see the log of the service for this request id")


def _from_http(request: Request, exc: HTTPException) -> ServiceError:
    if exc.status_code == HTTPStatus.NOT_FOUND:
        return UnknownPathError(
            f"{echo_value(path_of(request.scope))} is not a path of this service; see /docs"
        )
    if exc.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        return MethodNotAllowedError(
            f"{echo(request.method)} is not allowed here; use {_allowed_methods(request, exc)}"
        )
    return UnreadableBodyError(f"the body cannot be read: {exc.detail}; check how it is encoded")


def _allowed_methods(request: Request, exc: HTTPException) -> str:
    allowed = (exc.headers or {}).get("Allow", "")
    return (
        "GET, HEAD" if path_of(request.scope) in PROBES else allowed
    )  # two routes; Starlette names the first


def _problem(request: Request, error: ServiceError, exc: Exception) -> Response:
    headers = {}
    if isinstance(exc, HTTPException) and isinstance(error, MethodNotAllowedError):
        headers["Allow"] = _allowed_methods(request, exc)
    return problem_response(error, context_of(request).request_id, headers)
