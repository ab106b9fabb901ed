"""Answers say which texts the checkpoint did not read to their ends."""

from typing import Any

import pytest

from service.model_backend import Backend
from tests.service.fakes import FakeBackend, png_base64
from tests.service.running import site

LIMIT = FakeBackend().max_text_tokens
SHORT, LONG = "word " * LIMIT, "word " * (LIMIT + 1)
IMAGES = {"images": [png_base64(90)]}
REASON = "has more than the 8 tokens that 'fake' reads; its end was ignored"


async def warnings_of(path: str, body: dict[str, Any], backend: Backend | None = None) -> list[str] | None:
    async with site(backend) as running:
        response = await running.client.post(path, json=body)
        assert response.status_code == 200, response.text
        found: list[str] | None = response.json().get("warnings")
        return found


@pytest.mark.parametrize("mode", ["itc", "itm", "rerank"])
async def test_a_retrieval_text_that_is_cut_is_named(mode: str) -> None:
    body = {"text": LONG, "candidates": IMAGES, "mode": mode}
    assert await warnings_of("/retrieve", body) == [f"text: {REASON}"]
    assert await warnings_of("/retrieve", {**body, "text": SHORT}) is None


async def test_of_many_candidates_ten_are_named() -> None:
    body = {"image": png_base64(90), "candidates": {"texts": [SHORT, LONG, SHORT, LONG]}}
    expected = [f"candidates.texts.{index}: {REASON}" for index in (1, 3)]
    assert await warnings_of("/retrieve", body) == expected
    body = {"text": LONG, "candidates": {"texts": [LONG] * 12}}
    found = await warnings_of("/retrieve", body)
    assert found is not None
    assert found[0] == f"text: {REASON}"
    assert len(found) == 11
    assert found[-1] == "3 more texts are too long as well"


async def test_many_long_texts_are_counted_beside_the_event_loop() -> None:
    body = {"text": LONG, "candidates": {"texts": [SHORT * 40] * 60}}  # 96,000 characters
    found = await warnings_of("/retrieve", body)
    assert found is not None
    assert found[-1] == "51 more texts are too long as well"


@pytest.mark.parametrize("is_conditioned", [False, True])
async def test_a_question_is_named_where_the_qformer_reads_it(is_conditioned: bool) -> None:
    def backend() -> FakeBackend:
        return FakeBackend(is_question_conditioned=is_conditioned)

    reason = "has more tokens than the Q-Former of 'fake' reads; there its end was ignored"
    body = {"image": png_base64(90), "question": [SHORT, LONG]}
    expected = [f"question.1: {reason}"] if is_conditioned else None
    assert await warnings_of("/vqa", body, backend()) == expected
    body = {"image": png_base64(90), "prompt": LONG}
    expected = [f"prompt: {reason}"] if is_conditioned else None
    assert await warnings_of("/caption", body, backend()) == expected
    images = {"images": [png_base64(90), png_base64(91)], "prompt": LONG}
    async with site(backend()) as running:
        results = (await running.client.post("/caption", json=images)).json()["results"]
    assert [result.get("warnings") for result in results] == [expected, expected]
