"""Concurrent requests have the same responses as sequential requests."""

import asyncio
from typing import Any

import httpx
import pytest

from tests.integration.pictures import in_base64, picture
from tests.integration.processes import ServiceProcess, poll_async

Request = tuple[str, dict[str, Any]]


def mixed_requests(salt: str) -> list[Request]:
    """Return requests to all routes; another salt produces other files with the same pixels."""

    def image(seed: int) -> str:
        return in_base64(picture(seed, salt=salt))

    requests: list[Request] = []
    for seed in range(4):
        requests += [
            ("/caption", {"image": image(seed), "num_beams": seed + 1}),
            ("/caption", {"image": image(seed), "num_captions": 2, "max_new_tokens": 5 + seed}),
            ("/caption", {"image": image(seed), "do_sample": True, "seed": seed, "num_captions": 3}),
            ("/caption", {"image": image(seed), "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}),
            ("/vqa", {"image": image(seed), "question": ["what color", "how many stars"]}),
            ("/vqa", {"image": image(seed + 1), "question": "what", "num_beams": 1, "max_new_tokens": 20}),
            ("/retrieve", {"text": "a red star", "candidates": {"images": [image(0), image(seed)]}}),
            ("/retrieve", {"image": image(seed), "candidates": {"texts": ["a star", "two"]}, "mode": "itm"}),
        ]
    return requests


def batch_invariants(answer: dict[str, Any]) -> Any:
    """Return the parts that must not depend on the batch: texts, ranks and rounded scores."""
    if "captions" in answer:
        return [
            (caption["text"], pytest.approx(caption["score"], abs=1e-4)) for caption in answer["captions"]
        ]
    if "answers" in answer:
        return [(one["answer"], pytest.approx(one["score"], abs=1e-4)) for one in answer["answers"]]
    return [(result["index"], pytest.approx(result["score"], abs=1e-4)) for result in answer["results"]]


async def test_concurrent_mixed_requests_are_answered_as_alone(server: ServiceProcess) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

        async def ask(request: Request) -> Any:
            path, body = request
            response = await client.post(path, json=body)
            assert response.status_code == 200, response.text
            return batch_invariants(response.json())

        together = await asyncio.gather(*(ask(request) for request in mixed_requests("together")))
        alone = [await ask(request) for request in mixed_requests("alone")]
    assert together == alone
    assert server.metric("blip2_running") == 0
    assert server.metric("blip2_waiting") == 0


async def test_bad_requests_among_good_ones_harm_nobody(server: ServiceProcess) -> None:
    good = {"image": in_base64(picture(50, salt="good"))}
    bad = [{"image": "@@@"}, {"image": in_base64(b"text")}, {**good, "num_beams": 1000}, {}]
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        payloads = [good, *bad] * 5
        answers = await asyncio.gather(*(client.post("/caption", json=body) for body in payloads))
    assert [answer.status_code for answer in answers] == [200, 422, 415, 422, 422] * 5
    assert len({answer.json()["captions"][0]["text"] for answer in answers[::5]}) == 1


async def test_clients_that_hang_up_leave_nothing_behind(server: ServiceProcess) -> None:
    long = {"num_beams": 16, "min_new_tokens": 60, "max_new_tokens": 60}
    payloads = [{"image": in_base64(picture(seed, salt="gone")), **long} for seed in range(60, 72)]
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

        async def at_work() -> bool:
            return await asyncio.to_thread(server.metric, "blip2_running") > 0

        async def at_rest() -> bool:
            busy = [
                await asyncio.to_thread(server.metric, f"blip2_{what}") for what in ("running", "waiting")
            ]
            return busy == [0, 0]

        requests = [asyncio.create_task(client.post("/caption", json=body)) for body in payloads]
        await poll_async(at_work, 60)
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        await poll_async(at_rest, 60)
        assert server.metric('blip2_abandoned_total{reason="disconnected"}') > 0
        assert (await client.post("/caption", json=payloads[0])).status_code == 200
