"""Logs as JSON, one object a line, on standard error. No pixels, prompts or captions are ever logged."""

import json
import logging
import sys
import threading
from datetime import UTC, datetime
from typing import Final

FIELDS: Final = "fields"  # logger.info("request", extra={FIELDS: {…}}) puts the fields beside the message


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, the extra fields, and the traceback of an error."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure_logs(level: str) -> None:
    """Send all logs, warnings and uncaught errors of threads to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    for noisy in ("uvicorn.error", "uvicorn.access", "asyncio", "PIL", "urllib3", "filelock"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))
    threading.excepthook = _log_thread_death


def _log_thread_death(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None:
        name = args.thread.name if args.thread else "?"
        logging.getLogger(__name__).critical("thread %s died", name, exc_info=args.exc_value)
