"""Behind proxies and in browsers: prefixes, origins, and a documentation page without other hosts."""

import re
from collections.abc import Sequence

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from service.runtime.connection_pool import Access
from service.runtime.connections import ACCESS
from service.runtime.settings import Settings
from tests.service.fakes import FakeBackend, png_base64
from tests.service.running import Site, assert_problem, metric, site

ORIGIN = "https://a.example"
PREFIXED = Settings(root_path="/blip2/v1", preprocess_threads=1)
BODY = {"image": png_base64(100)}


def with_origins(origins: str) -> Settings:
    return Settings(cors_origins=origins, preprocess_threads=1)


@pytest.mark.parametrize("prefix", ["", "/blip2/v1"])
async def test_a_proxy_may_remove_its_prefix_or_leave_it(prefix: str) -> None:
    async with site(settings=PREFIXED) as running:
        assert (await running.client.post(f"{prefix}/caption", json=BODY)).status_code == 200
        assert (await running.client.get(f"{prefix}/readyz")).status_code == 200
        problem = assert_problem(await running.client.get(f"{prefix}/nowhere"), 404, "not_found")
        assert "'/nowhere' is not a path" in problem["detail"]
        response = await running.client.post(f"{prefix}/livez")
        assert_problem(response, 405, "method_not_allowed")
        assert response.headers["allow"] == "GET, HEAD"
        assert (await running.client.get(f"{prefix}/")).headers["location"] == "/blip2/v1/docs"
        document = (await running.client.get(f"{prefix}/openapi.json")).json()
        assert document["servers"] == [{"url": "/blip2/v1"}]
        assert await metric(running, 'blip2_requests_total{route="/caption",status="200"}') == 1


async def test_a_prefix_is_whole_segments_of_the_path() -> None:
    async with site(settings=PREFIXED) as running:
        for path in ("/blip2/v12/caption", "/blip2/caption", "/blip2/v1caption"):
            assert_problem(await running.client.post(path, json=BODY), 404, "not_found")
        assert (await running.client.get("/blip2/v1")).headers["location"] == "/blip2/v1/docs"


async def test_without_a_prefix_the_document_names_no_server() -> None:
    async with site() as running:
        assert "servers" not in (await running.client.get("/openapi.json")).json()
        assert (await running.client.get("/")).headers["location"] == "/docs"


@pytest.mark.parametrize("path", ["/caption/", "/vqa/", "/retrieve/", "/livez/", "/docs/"])
async def test_a_slash_too_many_is_404_and_never_a_redirect(path: str) -> None:
    async with site() as running:
        assert_problem(await running.client.post(path, json=BODY), 404, "not_found")
        assert_problem(await running.client.get(path), 404, "not_found")


@pytest.mark.parametrize("base", ["/", "/blip2/v1/"])
async def test_the_documentation_page_loads_all_it_needs_from_the_service(base: str) -> None:
    async with site(settings=PREFIXED) as running:
        page = await running.client.get(f"{base}docs")
        assert page.headers["content-type"].startswith("text/html")
        assert "//" not in re.sub(r"^\s*//.*$", "", page.text, flags=re.MULTILINE)  # no address of a host
        links = re.findall(r'(?:src|href)="([^"]+)"|url: \'([^\']+)\'', page.text)
        names = [first or second for first, second in links]
        assert len(names) == 4
        for name in names:
            response = await running.client.get(str(httpx.URL(str(page.url)).join(name)))
            assert response.status_code == 200
            assert len(response.content) > 1000
        assert "SwaggerUIBundle" in page.text


async def call(running: Site, method: str, path: str, origin: str = ORIGIN) -> httpx.Response:
    headers = {"Origin": origin}
    if method == "OPTIONS":
        headers["Access-Control-Request-Method"] = "POST"
        headers["Access-Control-Request-Headers"] = "content-type,x-request-timeout-ms,x-request-id"
        return await running.client.options(path, headers=headers)
    return await running.client.request(
        method, path, headers=headers, json=BODY if method == "POST" else None
    )


async def test_no_page_of_another_origin_is_allowed_by_default() -> None:
    async with site() as running:
        for method in ("POST", "OPTIONS"):
            response = await call(running, method, "/caption")
            assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("allowed", [ORIGIN, f" {ORIGIN} , http://localhost:3000", "*"])
async def test_a_page_of_an_allowed_origin_may_call_and_read_the_headers(allowed: str) -> None:
    async with site(settings=with_origins(allowed)) as running:
        response = await call(running, "POST", "/caption")
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] in (ORIGIN, "*")
        exposed = set(re.split(", ?", response.headers["access-control-expose-headers"]))
        assert exposed == {"X-Request-ID", "Server-Timing", "Retry-After"}
        preflight = await call(running, "OPTIONS", "/caption")
        assert preflight.status_code == 200
        assert "POST" in preflight.headers["access-control-allow-methods"]
        allowed_headers = preflight.headers["access-control-allow-headers"].lower()
        assert {"content-type", "x-request-timeout-ms", "x-request-id"} <= set(
            re.split(", ?", allowed_headers)
        )
        assert preflight.headers["x-request-id"]
        assert await metric(running, 'blip2_requests_total{route="/caption",status="200"}') == 1


async def test_a_page_of_another_origin_than_those_allowed_may_not() -> None:
    async with site(settings=with_origins(ORIGIN)) as running:
        for origin in ("https://a.example.org", "http://a.example", "null"):
            for method in ("POST", "OPTIONS"):
                response = await call(running, method, "/caption", origin)
                assert "access-control-allow-origin" not in response.headers


class Broken(FakeBackend):
    """Fails where no error of a request is foreseen."""

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        raise RuntimeError("a bug")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/nowhere", BODY, 404, "not_found"),
        ("GET", "/caption", None, 405, "method_not_allowed"),
        ("POST", "/vqa", BODY, 422, "invalid_request"),
        ("POST", "/caption", {**BODY, "logprobs": True}, 500, "internal_error"),
    ],
)
async def test_errors_can_be_read_by_the_page_too(
    method: str, path: str, body: dict[str, object] | None, status: int, code: str
) -> None:
    async with site(Broken(), with_origins(ORIGIN)) as running:
        response = await running.client.request(method, path, headers={"Origin": ORIGIN}, json=body)
        assert_problem(response, status, code)
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert response.headers["x-content-type-options"] == "nosniff"


async def test_a_refusal_before_the_routes_can_be_read_too() -> None:
    async with site(settings=with_origins(ORIGIN)) as running:
        headers = {f"x-{index}": "a" for index in range(100)}
        response = await running.client.get("/livez", headers={**headers, "Origin": ORIGIN})
        assert_problem(response, 431, "headers_too_large")
        assert response.headers["access-control-allow-origin"] == ORIGIN

        async def busy(scope: Scope, receive: Receive, send: Send) -> None:
            await running.app({**scope, "state": {ACCESS: Access.EXTRA}}, receive, send)

        transport = httpx.ASGITransport(busy)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            response = await client.post("/caption", json=BODY, headers={"Origin": ORIGIN})
        assert_problem(response, 503, "too_many_connections")
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert response.headers["retry-after"] == "5"
        assert await metric(running, 'blip2_shed_total{reason="too_many_connections"}') == 1


@pytest.mark.parametrize("path", ["/caption", "/vqa", "/retrieve"])
@pytest.mark.parametrize("query", ["num_beams=3", "num_beams=3&seed=1", "a=b", "prompt=", "prompt", "%20=1"])
async def test_a_query_parameter_is_refused_not_ignored(path: str, query: str) -> None:
    async with site() as running:
        problem = assert_problem(
            await running.client.post(f"{path}?{query}", json=BODY), 422, "invalid_request"
        )
        assert problem["errors"] == [
            {
                "field": problem["errors"][0]["field"],
                "message": "is a query parameter, which is not read; send it in the body",
            }
        ]


async def test_an_empty_query_and_queries_of_probes_are_harmless() -> None:
    async with site() as running:
        assert (await running.client.post("/caption?", json=BODY)).status_code == 200
        assert (await running.client.get("/readyz?now=1")).status_code == 200
