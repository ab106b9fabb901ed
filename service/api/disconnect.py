"""The caller: its name, its deadline and its disconnection, while its body arrives and while the work runs.

Deadline and disconnection end the work by cancellation alone.
"""

import ipaddress
import time
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from service.api.middleware import context_of
from service.errors import (
    BodyTooLargeError,
    ClientGoneError,
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    RequestTimeoutError,
    echo_value,
)
from service.runtime.readiness import InterruptedWorkError, UploadLease, unless
from service.runtime.settings import Settings

TIMEOUT_HEADER: Final = "X-Request-Timeout-Ms"
MAX_TIMEOUT_MS: Final = 3_600_000
_RETRY_S: Final = 5
_MAX_CALLER_CHARS: Final = 60

T = TypeVar("T")


def caller_of(request: Request) -> str:
    """Return what tells callers apart: the client's address, of IPv6 its network of 64 bits.

    uvicorn takes it from X-Forwarded-For where the proxy is trusted (FORWARDED_ALLOW_IPS).
    """
    host = request.client.host if request.client is not None else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # whatever the proxy wrote
        return host[:_MAX_CALLER_CHARS]
    return host if address.version == 4 else str(ipaddress.ip_network((address, 64), strict=False))


def deadline_of(request: Request) -> float | None:
    """Return the caller's deadline on the monotonic clock, or None.

    Raises InvalidRequestError where X-Request-Timeout-Ms is not a number of milliseconds up to an hour.
    """
    budget = request.headers.get(TIMEOUT_HEADER)
    if budget is None:
        return None
    if not (budget.isascii() and budget.isdigit() and len(budget) < 9 and 1 <= int(budget) <= MAX_TIMEOUT_MS):
        raise InvalidRequestError.of(
            TIMEOUT_HEADER,
            f"{echo_value(budget)} is not a whole number from 1 to {MAX_TIMEOUT_MS}; correct or drop it",
        )
    return context_of(request).arrived + int(budget) / 1000


def deadline_error(request: Request) -> DeadlineExceededError:
    budget_ms = request.headers.get(TIMEOUT_HEADER)
    return DeadlineExceededError(
        f"no answer within the {budget_ms} ms of {TIMEOUT_HEADER}; allow more, or ask for less"
    )


class BodyReceiver:
    """Receives bodies within limits of bytes and of time."""

    def __init__(self, settings: Settings) -> None:
        self._max_bytes = settings.max_body_bytes
        self._timeout_s = settings.upload_timeout_ms / 1000

    async def receive(
        self, request: Request, body: bytearray, lease: UploadLease, deadline: float | None
    ) -> None:
        """Append the body of a request to `body`, which the caller clears on an error.

        Raises RequestTimeoutError (408), BodyTooLargeError (413), OverloadedError (429),
        DeadlineExceededError (504) or ClientDisconnect.
        """
        left_s = self._timeout_s if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            async with lease.arrive(min(self._timeout_s, left_s)):
                await self._receive(request, body, lease)
        except TimeoutError:
            if lease.is_displaced:
                raise OverloadedError(
                    "too many uploads at once, and this one was the slowest; send it again, and faster",
                    retry_after_s=_RETRY_S,
                ) from None
            if left_s < self._timeout_s:
                raise deadline_error(request) from None
            raise RequestTimeoutError(
                f"the body has not arrived within {self._timeout_s:g} s (BLIP2_UPLOAD_TIMEOUT_MS); "
                "send it faster, or less at once"
            ) from None

    async def _receive(self, request: Request, body: bytearray, lease: UploadLease) -> None:
        declared = request.headers.get("content-length", "")
        if declared.isdecimal():  # h11 refuses others, and those of more than 20 digits
            self._check_size(int(declared))
            lease.declare(int(declared))
        more = True
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            self._check_size(len(body))
            lease.grow_to(len(body))
            more = message.get("more_body", False)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise BodyTooLargeError(
                f"the body has {num_bytes} bytes or more, the limit is {self._max_bytes}; "
                "send fewer or smaller images"
            )


async def cancel_on_disconnect_or_deadline(
    request: Request, deadline: float | None, work: Coroutine[Any, Any, T]
) -> T:
    """Await the work, or cancel it when the caller's deadline passes or the caller disconnects.

    Cancellation reaches images not yet decoded, queued requests and beams on the device. The body must have
    been read. Raises DeadlineExceededError or ClientGoneError.
    """
    timeout_s = None if deadline is None else max(0.0, deadline - time.monotonic())
    try:
        return await unless(_await_disconnect(request.receive), work, timeout_s=timeout_s)
    except InterruptedWorkError as exc:
        if exc.is_late:
            raise deadline_error(request) from None
        raise ClientGoneError("the client closed the connection before the answer was ready") from None


async def _await_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
