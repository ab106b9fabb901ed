"""Requests in forms and headers as HTTP clients send them, over the whole application."""

import json
import zlib

import pytest
from starlette.types import Message, Scope

from tests.service.fakes import png, png_base64
from tests.service.running import assert_problem, site

BODY = json.dumps({"image": png_base64(100)}).encode()


@pytest.mark.parametrize("name", ["images", "images[]", "candidates", "candidates[images][]"])
async def test_candidate_images_are_ranked_whether_in_base64_or_as_files(name: str) -> None:
    async with site() as running:
        levels = (10, 200, 90)
        sent = {"image": png_base64(100), "candidates": {"images": [png_base64(level) for level in levels]}}
        expected = (await running.client.post("/retrieve", json=sent)).json()
        files = [("image", ("q.png", png(100))), *((name, (f"{level}.png", png(level))) for level in levels)]
        answer = (await running.client.post("/retrieve", files=files)).json()
        assert len(expected["results"]) == 3
        assert answer["results"] == expected["results"]


async def test_a_damaged_candidate_file_is_named_by_its_place() -> None:
    async with site() as running:
        files = [("images", ("a.png", png(1))), ("images", ("b.png", png(2)[:40]))]
        response = await running.client.post("/retrieve", files=files, data={"text": "a"})
        problem = assert_problem(response, 422, "invalid_image")
        assert [at["field"] for at in problem["errors"]] == ["candidates.images.1"]


async def test_an_empty_image_file_is_told_as_such() -> None:
    async with site() as running:
        response = await running.client.post("/caption", files={"image": ("a.png", b"")})
        assert "image: " in assert_problem(response, 422, "invalid_image")["detail"]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, br"])
async def test_an_encoded_body_is_refused_by_the_name_of_its_encoding(encoding: str) -> None:
    async with site() as running:
        headers = {"content-type": "application/json", "content-encoding": encoding}
        response = await running.client.post("/caption", content=zlib.compress(BODY), headers=headers)
        assert repr(encoding) in assert_problem(response, 415, "unsupported_content_type")["detail"]


@pytest.mark.parametrize(
    "headers",
    [
        [("content-type", "application/json"), ("content-type", "text/plain")],
        [("content-type", "multipart/form-data; boundary=X"), ("content-type", "application/json")],
        [("content-type", "text/plain")],
    ],
)
async def test_a_header_that_is_sent_twice_is_not_read_as_its_first(headers: list[tuple[str, str]]) -> None:
    async with site() as running:
        response = await running.client.post("/caption", content=BODY, headers=headers)
        assert_problem(response, 415, "unsupported_content_type")
        twice = [
            ("content-type", "application/json"),
            ("content-encoding", "gzip"),
            ("content-encoding", "br"),
        ]
        response = await running.client.post("/caption", content=BODY, headers=twice)
        assert "'gzip, br'" in assert_problem(response, 415, "unsupported_content_type")["detail"]


async def test_head_is_answered_as_get_without_the_body() -> None:
    async with site() as running:
        document = (await running.client.get("/openapi.json")).json()
        of_document = [path for path, item in document["paths"].items() if "get" in item]
        files = ["/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css", "/docs/favicon.png"]
        for path in (*of_document, "/", "/docs", "/openapi.json", *files):
            head, get = [await running.client.request(method, path) for method in ("HEAD", "GET")]
            assert (path, head.status_code) == (path, get.status_code)
            assert head.headers["content-type"] == get.headers["content-type"] if get.content else True
        assert len(of_document) > 5
        response = await running.client.post("/docs")
        assert_problem(response, 405, "method_not_allowed")
        assert set(response.headers["allow"].split(", ")) == {"GET", "HEAD"}


async def test_a_target_in_absolute_form_is_its_path() -> None:
    async with site() as running:
        for target in ("http://test/livez", "HTTPS://other:1/livez", "http://[::1]:8000/livez"):
            statuses = list[int]()

            async def send(message: Message, statuses: list[int] = statuses) -> None:
                statuses += [message["status"]] if "status" in message else []

            async def receive() -> Message:
                return {"type": "http.request", "body": b"", "more_body": False}

            scope: Scope = {
                "type": "http",
                "method": "GET",
                "path": target,
                "headers": [],
                "query_string": b"",
            }
            await running.app(scope, receive, send)
            assert statuses == [200]


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("path", ["/caption", "/vqa", "/retrieve"])
async def test_another_method_is_405_with_the_one_that_is_allowed(method: str, path: str) -> None:
    async with site() as running:
        response = await running.client.request(method, path)
        assert response.status_code == 405
        assert response.headers["allow"] == "POST"
