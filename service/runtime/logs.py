"""Logs as JSON, one object a line, on standard error. No pixels, prompts or captions are ever logged."""

import json
import logging
import sys
import threading
from datetime import UTC, datetime
from typing import Final

from service.request_ids import REQUEST_IDS

_MAX_IDS: Final = 64  # of one line; a step of the engine may serve more requests
_MAX_MESSAGES: Final = 100
_QUIET_S: Final = 10.0
FIELDS: Final = "fields"  # logger.info("request", extra={FIELDS: {…}}) puts the fields beside the message


class RepeatFilter(logging.Filter):
    """Passes one record of each message in ten seconds, with the number of those left out before it.

    For loggers of libraries that write a line for each connection, or each turn of the event loop.
    """

    def __init__(self) -> None:
        super().__init__()
        self._passed: dict[str, float] = {}  # when the message passed last
        self._num_left_out: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.name != "asyncio":
            return True  # the traceback of one request
        message, now = str(record.msg), record.created
        if now - self._passed.get(message, -_QUIET_S) < _QUIET_S:
            self._num_left_out[message] = self._num_left_out.get(message, 0) + 1
            return False
        if len(self._passed) >= _MAX_MESSAGES:
            self._passed.clear()
        self._passed[message] = now
        if num_left_out := self._num_left_out.pop(message, 0):
            record.msg = f"{record.getMessage()} ({num_left_out} more of these were left out)"
            record.args = None
        return True


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, the extra fields, and the traceback of an error.

    request_id: of the request that the line concerns; request_ids: of several.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_request_ids(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _request_ids() -> dict[str, object]:
    ids = REQUEST_IDS.get()
    return {"request_id": ids[0]} if len(ids) == 1 else {"request_ids": ids[:_MAX_IDS]} if ids else {}


def configure_logs(level: str) -> None:
    """Send all logs, warnings and uncaught errors of threads to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    for noisy in ("uvicorn.error", "uvicorn.access", "asyncio", "PIL", "urllib3", "filelock"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # the caller gets the error
    for repetitive in ("uvicorn.error", "asyncio"):
        logging.getLogger(repetitive).addFilter(RepeatFilter())
    threading.excepthook = _log_thread_death


def _log_thread_death(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None:
        name = args.thread.name if args.thread else "?"
        logging.getLogger(__name__).critical("thread %s died", name, exc_info=args.exc_value)
