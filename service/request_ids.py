"""The ids of the requests that the present work is for. Log lines carry them; see `runtime.logs`."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

REQUEST_IDS: Final[ContextVar[tuple[str, ...]]] = ContextVar("request_ids", default=())


@contextmanager
def logged_for(request_ids: Iterable[str]) -> Iterator[None]:
    """Add these ids to the log lines within the block. Each id comes once."""
    token = REQUEST_IDS.set(tuple(dict.fromkeys(request_ids)))
    try:
        yield
    finally:
        REQUEST_IDS.reset(token)
