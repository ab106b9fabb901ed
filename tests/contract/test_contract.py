"""Compare what clients and operators rely on with recorded files.

A change that is meant is recorded with `BLIP2_RECORD_CONTRACT=1 python -m pytest tests/contract`, and its
difference read. Texts written for people (descriptions, help) are no part of it.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model import EmbeddingKind
from service.api.app import create_app
from service.cache.wire import pack, redis_key
from service.errors import ServiceError
from service.runtime.logs import JsonFormatter
from service.runtime.metrics import Metrics
from service.runtime.settings import PREFIX, Settings
from tests.service.fakes import FakeBackend, png_base64
from tests.service.running import site

GOLDEN = Path(__file__).parent / "golden"
FOR_PEOPLE = ("description", "summary")


def assert_recorded(name: str, found: object) -> None:
    """Compare with a recorded file; write it instead where BLIP2_RECORD_CONTRACT is set."""
    path = GOLDEN / f"{name}.json"
    text = json.dumps(found, indent=1, sort_keys=True, default=str) + "\n"
    if os.environ.get("BLIP2_RECORD_CONTRACT"):
        path.write_text(text)
    assert json.loads(text) == json.loads(path.read_text())


def without_texts(document: Any) -> Any:
    """Return a JSON document without what is written for people."""
    if isinstance(document, dict):
        return {
            key: without_texts(value)
            for key, value in document.items()
            if not (key in FOR_PEOPLE and isinstance(value, str))
        }
    if isinstance(document, list):
        return [without_texts(value) for value in document]
    return document


def tree_of(error: type[ServiceError]) -> Iterator[type[ServiceError]]:
    yield error
    for child in error.__subclasses__():
        yield from tree_of(child)


def test_routes_fields_and_bounds_are_those_recorded() -> None:
    app = create_app(Settings(), FakeBackend)
    document = without_texts(app.openapi())
    del document["info"]["version"]
    assert_recorded("openapi", document)


def test_settings_defaults_and_bounds_are_those_recorded() -> None:
    schema = without_texts(Settings.model_json_schema())
    assert_recorded("settings", {"prefix": PREFIX, "fields": schema["properties"]})


def test_metric_names_labels_and_buckets_are_those_recorded() -> None:
    series = sorted(
        line.rpartition(" ")[0]
        for line in Metrics().exposition().decode().splitlines()
        if line.startswith("blip2_") and "_created" not in line
    )
    types = re.findall(r"^# TYPE (blip2_\S+) (\w+)$", Metrics().exposition().decode(), re.MULTILINE)
    assert_recorded("metrics", {"series": series, "types": sorted(types)})


def test_error_codes_and_statuses_are_those_recorded() -> None:
    table = {error.code: error.status for error in tree_of(ServiceError)}
    assert_recorded("errors", table)


def test_redis_keys_and_values_are_those_recorded() -> None:
    keys = {
        kind.value: redis_key(digest="a" * 64, fingerprint="b" * 64, preprocess_version="1", kind=kind)
        for kind in EmbeddingKind
    }
    values = {
        str(dtype): hashlib.sha256(pack("key", torch.arange(6).reshape(2, 3).to(dtype))).hexdigest()
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    assert_recorded("redis", {"keys": keys, "values": values})


async def test_log_fields_of_a_request_are_those_recorded(caplog: pytest.LogCaptureFixture) -> None:
    found: dict[str, object] = {}
    payloads: dict[str, dict[str, object]] = {
        "/caption": {"image": png_base64()},
        "/vqa": {"image": png_base64(), "question": "what is it?"},
        "/retrieve": {"text": "50", "candidates": {"images": [png_base64()]}},
    }
    async with site() as running:
        for path, body in payloads.items():
            caplog.clear()
            with caplog.at_level(logging.INFO, "service"):
                response = await running.client.post(path, json=body)
            (record,) = [one for one in caplog.records if one.getMessage() == "request"]
            line = json.loads(JsonFormatter().format(record))
            found[path] = {
                "log": sorted(set(line) - {"logger"}),
                "timings": list(line["timings_ms"]),
                "headers": sorted(set(response.headers) - {"content-length"}),
                "server-timing": re.findall(r"(\w+);", response.headers["server-timing"]),
                "answer": shape_of(response.json()),
            }
    assert_recorded("requests", found)


def shape_of(value: object) -> object:
    """Return the keys and types of a JSON value."""
    if isinstance(value, dict):
        return {key: shape_of(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape_of(inner) for inner in value[:1]]
    return type(value).__name__
