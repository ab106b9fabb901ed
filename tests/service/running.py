"""An engine with its queue and an application with its lifespan, over a fake model; ways to observe them."""

import asyncio
import inspect
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import FastAPI

from model import GenerationParams
from service.api.app import create_app
from service.cache.lru import LruTier
from service.engine.engine import Engine
from service.engine.image_pool import ImageInput
from service.engine.request import AnyRequest, GenerateInput, Generations, Matches, MatchInput, Mode, Request
from service.engine.request_queue import RequestQueue, Throughput
from service.model_backend import Backend
from service.runtime.lifecycle import FatalError, Lifecycle
from service.runtime.metrics import Metrics
from service.runtime.settings import Settings
from tests.service.fakes import TIMEOUT_S, FakeBackend, pixels

GREEDY = GenerationParams(num_beams=1)


def until(condition: Callable[[], object]) -> None:
    """Return once the condition holds, which another thread brings about; fail after 20 seconds."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.002)


async def until_async(condition: Callable[[], object]) -> None:
    """As `until`, without holding up the event loop; the condition may be a coroutine function."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            holds = condition()
            if await holds if inspect.isawaitable(holds) else holds:
                return
            await asyncio.sleep(0.002)


@dataclass
class EngineHarness:
    """A running engine, and shorthands to submit requests to it."""

    backend: FakeBackend
    queue: RequestQueue
    memory: LruTier
    engine: Engine

    def submit(self, request: AnyRequest, num_items: int = 1) -> None:
        (reservation,) = self.queue.make_reservations(num_items)
        reservation.submit(request)

    def image(self, red: int) -> ImageInput:
        return ImageInput(f"digest-{red}", pixels(red), {})

    def caption(
        self,
        red: int,
        *prompts: str,
        params: GenerationParams = GREEDY,
        deadline: float | None = None,
        image: ImageInput | None = None,
        caller: str = "",
    ) -> Request[Generations]:
        """Submit a request and return it."""
        prompt_ids = tuple(self.backend.tokenize_prompt(prompt, params) for prompt in prompts or ("a photo",))
        inputs = GenerateInput(image or self.image(red), prompt_ids, params)
        request: Request[Generations] = Request(inputs, deadline, caller=caller)
        self.submit(request)
        return request

    def match(
        self,
        query: str | ImageInput,
        *candidates: str | ImageInput,
        mode: Mode = Mode.ITC,
        rerank_k: int = 128,
        top_k: int = 100,
    ) -> Request[Matches]:
        """Submit a request and return it."""
        request: Request[Matches] = Request(MatchInput(query, candidates, mode, rerank_k, top_k))
        self.submit(request)
        return request


@contextmanager
def running_engine(
    backend: FakeBackend | None = None,
    *,
    max_rows: int = 64,
    max_items: int = 256,
    cache_bytes: int = 2**20,
    max_kv_bytes: int = 2**40,
    started: bool = True,
) -> Iterator[EngineHarness]:
    backend = backend or FakeBackend()
    throughput = Throughput(jitter=lambda: 0.0)
    queue, memory = RequestQueue(max_items, throughput), LruTier(cache_bytes)
    engine = Engine(
        backend,
        queue,
        memory,
        throughput=throughput,
        metrics=Metrics(),
        max_rows=max_rows,
        max_kv_bytes=max_kv_bytes,
    )
    if started:
        engine.start()
    try:
        yield EngineHarness(backend, queue, memory, engine)
    finally:
        backend.encode_gate.set()
        backend.decode_gate.set()
        engine.stop(TIMEOUT_S)


def text_of(request: Request[Generations], prompt: int = 0) -> str:
    """Wait for the best text of a request."""
    return request.future.result(TIMEOUT_S).value[prompt][0].text


@dataclass
class Site:
    """An application that is ready, and a client of it."""

    app: FastAPI
    client: httpx.AsyncClient

    @property
    def lifecycle(self) -> Lifecycle:
        lifecycle: Lifecycle = self.app.state.lifecycle
        return lifecycle


@asynccontextmanager
async def site(
    backend: Backend | None = None,
    settings: Settings | None = None,
    *,
    wait: bool = True,
    on_failure: Callable[[FatalError], None] = lambda _: None,
) -> AsyncIterator[Site]:
    """Serves `backend` in this process, without sockets."""
    ready = asyncio.Event()
    model = backend or FakeBackend()
    app = create_app(
        settings or Settings(preprocess_threads=1),
        lambda: model,
        on_ready=lambda _: ready.set(),
        on_failure=on_failure,
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        if wait:
            await asyncio.wait_for(ready.wait(), TIMEOUT_S)
        yield Site(app, client)


def assert_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["type"] == f"urn:blip2:problem:{code}"
    assert problem["title"]
    assert problem["request_id"] == response.headers["x-request-id"]
    assert response.headers["server-timing"].startswith(("total;dur=", "queue;dur="))
    return problem


def sample(metrics: str, series: str) -> float:
    found = re.search(rf"^{re.escape(series)} (\S+)$", metrics, re.MULTILINE)
    assert found, f"{series} is not among the metrics"
    return float(found[1])


async def metric(running: Site, series: str) -> float:
    return sample((await running.client.get("/metrics")).text, series)


async def until_waiting(running: Site, num_items: int) -> None:
    async def arrived() -> bool:
        return await metric(running, "blip2_waiting") == num_items

    await until_async(arrived)


async def answers(running: Site, path: str, status: int) -> bool:
    return (await running.client.get(path)).status_code == status
