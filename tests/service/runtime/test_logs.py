"""Log lines: one JSON object each."""

import json
import logging
import sys

from service.request_ids import logged_for
from service.runtime.logs import FIELDS, JsonFormatter, RepeatFilter


def line(message: str, *args: object, **extra: object) -> dict[str, object]:
    record = logging.LogRecord("service.test", logging.INFO, "file.py", 1, message, args, None)
    record.__dict__.update(extra)
    formatted = JsonFormatter().format(record)
    assert "\n" not in formatted
    parsed: dict[str, object] = json.loads(formatted)
    return parsed


def test_a_queue_is_one_json_object_with_its_fields() -> None:
    parsed = line("served %s", "it", **{FIELDS: {"status": 200, "request_id": "abc"}})
    assert parsed.keys() == {"time", "level", "logger", "message", "status", "request_id"}
    assert (parsed["message"], parsed["status"], parsed["level"]) == ("served it", 200, "INFO")


def test_queue_breaks_cannot_forge_a_second_line() -> None:
    assert line("a\nb")["message"] == "a\nb"


def test_what_json_does_not_know_is_written_as_text() -> None:
    assert line("x", **{FIELDS: {"path": object}})["path"] == str(object)


def test_a_line_carries_the_ids_of_the_requests_it_concerns() -> None:
    assert "request_id" not in line("x")
    with logged_for(["one", "one"]):
        assert line("x")["request_id"] == "one"
        assert line("x", **{FIELDS: {"request_id": "own"}})["request_id"] == "own"
    with logged_for(map(str, range(100))):
        assert line("x")["request_ids"] == [str(index) for index in range(64)]
    assert "request_ids" not in line("x")


def test_an_error_brings_its_traceback() -> None:
    try:
        raise ValueError("the reason")
    except ValueError:
        record = logging.LogRecord("service", logging.ERROR, "f.py", 1, "failed", (), sys.exc_info())
    parsed = json.loads(JsonFormatter().format(record))
    assert "the reason" in parsed["traceback"]


def test_a_message_that_repeats_is_written_once_with_the_number_left_out() -> None:
    repeats = RepeatFilter()

    def passes(
        message: str, created: float, name: str = "uvicorn.error", exc_info: object = None
    ) -> str | None:
        fields = {"name": name, "msg": message, "args": (), "created": created, "exc_info": exc_info}
        record = logging.makeLogRecord(fields)
        return record.getMessage() if repeats.filter(record) else None

    assert passes("bad", 100.0) == "bad"
    assert [passes("bad", 100.0 + second) for second in range(1, 10)] == [None] * 9
    assert passes("worse", 105.0) == "worse"
    assert passes("bad", 110.0) == "bad (9 more of these were left out)"
    error = (ValueError, ValueError(), None)
    assert [passes("traceback", 100.0, exc_info=error) for _ in range(2)] == ["traceback"] * 2
    assert [passes("accept", 100.0, "asyncio", error) for _ in range(2)] == ["accept", None]
