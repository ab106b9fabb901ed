"""The one tree of errors: each class carries its HTTP status, its code and its title.

A message names the value, the limit and the cure, and is safe to show to the caller.
"""

import reprlib
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from model import errors as model_errors

MAX_ECHOED: Final = 60  # characters of what a caller sent that an error repeats

_REPR: Final = reprlib.Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = MAX_ECHOED


def echo(text: str) -> str:
    """Return the beginning of a text that a caller sent: a name, a path, a media type."""
    return text if len(text) <= MAX_ECHOED else f"{text[:MAX_ECHOED]}…"


def echo_value(value: object) -> str:
    """Return the beginning of a value that a caller sent, as Python writes it."""
    # A text is cut first: reprlib would show its end instead of a longer beginning.
    return echo(repr(value[:MAX_ECHOED]) if isinstance(value, str) else _REPR.repr(value))


@dataclass(frozen=True, slots=True)
class FieldError:
    """The fault of one field; `field` is its path, such as `candidates.images.3`."""

    field: str
    message: str


class ServiceError(Exception):
    """The base of the tree.

    fields: the fields at fault, if any. retry_after_s: after which a retry may succeed.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Internal error"
    closes_connection: ClassVar[bool] = False

    def __init__(
        self, detail: str, *, fields: tuple[FieldError, ...] = (), retry_after_s: int | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.fields = fields
        self.retry_after_s = retry_after_s


class RequestError(ServiceError):
    """An error the caller can correct."""

    status = 400
    code = "bad_request"
    title = "Bad request"


class UnreadableBodyError(RequestError):
    code = "unreadable_body"
    title = "The body cannot be read"


class RequestTimeoutError(RequestError):
    status = 408
    code = "request_timeout"
    title = "The request took too long to arrive"
    closes_connection = True


class HeadersTooLargeError(RequestError):
    status = 431
    code = "headers_too_large"
    title = "The headers are too large"
    closes_connection = True


class InvalidHttpError(RequestError):
    code = "invalid_http"
    title = "Not an HTTP request"
    closes_connection = True


class AmbiguousLengthError(RequestError):
    """Two parties could disagree where such a request ends, and take its body for the next one."""

    code = "ambiguous_length"
    title = "The length of the body is ambiguous"
    closes_connection = True


class UnknownPathError(RequestError):
    status = 404
    code = "not_found"
    title = "No such path"


class TaskUnavailableError(RequestError):
    status = 404
    code = "task_unavailable"
    title = "This checkpoint cannot do this task"


class MethodNotAllowedError(RequestError):
    status = 405
    code = "method_not_allowed"
    title = "Method not allowed"


class TooLargeError(RequestError):
    status = 413
    code = "too_large"
    title = "Too large"


class BodyTooLargeError(TooLargeError):
    code = "body_too_large"
    title = "The body is too large"


class ImageTooLargeError(TooLargeError):
    code = "image_too_large"
    title = "The image file is too large"


class TooManyItemsError(TooLargeError):
    code = "too_many_items"
    title = "Too many items in one request"


class UnsupportedContentTypeError(RequestError):
    status = 415
    code = "unsupported_content_type"
    title = "Unsupported content type"


class UnsupportedImageError(RequestError):
    status = 415
    code = "unsupported_image"
    title = "Not an image format that is read here"


class InvalidRequestError(RequestError):
    status = 422
    code = "invalid_request"
    title = "A field is invalid"

    @classmethod
    def of(cls, field: str, message: str) -> Self:
        """Build the error of a single field."""
        return cls(f"{field}: {message}", fields=(FieldError(field, message),))


class InvalidImageError(InvalidRequestError):
    code = "invalid_image"
    title = "The image cannot be used"


class InvalidPromptError(InvalidRequestError):
    code = "invalid_prompt"
    title = "The prompt cannot be used"


class InvalidParamsError(InvalidRequestError):
    code = "invalid_params"
    title = "The generation parameters cannot be used"


class ClientGoneError(RequestError):
    """The client disconnected; this is only for the log and the metrics."""

    status = 499
    code = "client_gone"
    title = "The client disconnected"


class ShedError(ServiceError):
    """Caused by the state of the service, not by the request; a later retry may succeed."""

    status = 503
    code = "unavailable"
    title = "Unavailable"


class OverloadedError(ShedError):
    status = 429
    code = "overloaded"
    title = "Too much work at once"


class TooManyConnectionsError(ShedError):
    code = "too_many_connections"
    title = "Too many connections"
    closes_connection = True


class NotReadyError(ShedError):
    code = "not_ready"
    title = "Not ready"


class DrainingError(ShedError):
    code = "draining"
    title = "Shutting down"


class DeadlineExceededError(ServiceError):
    status = 504
    code = "deadline_exceeded"
    title = "The caller's deadline passed"


class InferenceFailedError(ServiceError):
    """The model failed on this input; the details are in the log, never in the answer."""

    code = "inference_failed"
    title = "Inference failed"


class OutOfDeviceMemoryError(InferenceFailedError):
    code = "out_of_device_memory"
    title = "The device's memory is too small for this"


class LostRequestError(ServiceError):
    """The engine was lost while this was on the device. It may be the cause: it must not be retried."""

    code = "engine_lost"
    title = "The engine was lost"


_FROM_MODEL: dict[type[model_errors.ModelError], type[ServiceError]] = {
    model_errors.UnknownImageFormatError: UnsupportedImageError,
    model_errors.InvalidImageFileError: InvalidImageError,
    model_errors.InvalidPromptError: InvalidPromptError,
    model_errors.InvalidParamsError: InvalidParamsError,
    model_errors.TaskUnavailableError: TaskUnavailableError,
}


def for_caller(error: Exception) -> ServiceError:
    """Return what the caller may see: errors made for callers as they are, others without their details."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, model_errors.ModelError) and type(error) in _FROM_MODEL:
        return _FROM_MODEL[type(error)](str(error))
    return InferenceFailedError("the model failed on this input; see the log of the service")
