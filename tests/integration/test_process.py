"""The process: start, start-up errors, and shutdown."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.pictures import in_base64, picture
from tests.integration.processes import ServiceProcess, poll_async, service

NUM_REQUESTS = 30
LONG = {"num_beams": 16, "min_new_tokens": 60, "max_new_tokens": 60}


def test_it_says_where_it_serves(server: ServiceProcess, random_checkpoint: Path) -> None:
    assert server.output == f"serving {random_checkpoint} on {server.url} (docs: /docs)\n"


async def test_sigterm_under_load_loses_nothing_and_exits_with_0(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    with service(tmp_path, model=random_checkpoint, drain_timeout_ms=60_000) as server:
        limits = httpx.Limits(max_connections=NUM_REQUESTS + 5, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            requests = [
                asyncio.create_task(client.post("/caption", json={"image": in_base64(picture(seed)), **LONG}))
                for seed in range(NUM_REQUESTS)
            ]
            await poll_async(partial(all_accepted, client), 60)
            server.terminate()
            await poll_async(partial(not_ready, client), 30)
            assert (await client.get("/readyz")).json()["code"] == "draining"
            refused = await client.post("/caption", json={"image": in_base64(picture(0))})
            assert (refused.status_code, refused.json()["code"]) == (503, "draining")
            assert refused.headers["connection"] == "close"
            assert int(refused.headers["retry-after"]) > 0
            answers = await asyncio.gather(*requests)
        assert [answer.status_code for answer in answers] == [200] * NUM_REQUESTS
        assert all(answer.json()["captions"][0]["num_tokens"] == 60 for answer in answers)
        assert server.wait() == 0
        assert "Traceback" not in server.errors


async def all_accepted(client: httpx.AsyncClient) -> bool:
    """Return whether all requests are waiting, running or answered."""
    metrics = (await client.get("/metrics")).text
    series = ("blip2_waiting ", "blip2_running ", 'blip2_requests_total{route="/caption",status="200"} ')
    accepted = sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(series))
    return accepted >= NUM_REQUESTS


async def not_ready(client: httpx.AsyncClient) -> bool:
    return (await client.get("/readyz")).status_code == 503


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modle": "tiny"}, "blip2: BLIP2_MODLE is not a setting; the nearest is BLIP2_MODEL"),
        ({"port": "http"}, "blip2: BLIP2_PORT is 'http': "),
    ],
)
def test_a_wrong_setting_is_told_in_one_line(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    refused = ServiceProcess(tmp_path, **settings)
    assert refused.wait() == 1
    assert refused.errors.startswith(message)
    assert refused.errors.count("\n") == 1
    assert refused.output == ""


def test_a_checkpoint_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    refused = ServiceProcess(tmp_path, model="/no/such/checkpoint", log_level="ERROR")
    assert refused.wait() == 1
    assert refused.errors.startswith("blip2: ")
    assert "/no/such/checkpoint" in refused.errors
    assert refused.errors.count("\n") == 1


def test_a_port_that_is_taken_is_told_in_one_line(server: ServiceProcess, tmp_path: Path) -> None:
    port = httpx.URL(server.url).port
    refused = ServiceProcess(tmp_path, port=port, log_level="ERROR")
    assert refused.wait() == 1
    assert refused.errors.startswith(f"blip2: cannot listen on 127.0.0.1:{port}: ")
    assert "BLIP2_PORT" in refused.errors
    assert refused.errors.count("\n") == 1
