"""An engine with its line, and an application with its lifespan, over a fake model; how to look at them."""

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
from service.app import create_app
from service.backend import Backend
from service.cache import MemoryCache
from service.engine import Engine
from service.jobs import GenerateJob, ImageInput, Job, MatchJob, Mode, Ticket
from service.lifecycle import FatalError, Lifecycle
from service.metrics import Metrics
from service.scheduler import Line, ServiceRate
from service.settings import Settings
from tests.service.fakes import TIMEOUT_S, FakeBackend, pixels

GREEDY = GenerationParams(num_beams=1)


def until(condition: Callable[[], object]) -> None:
    """Returns once the condition holds, which another thread brings about; fails after 20 seconds."""
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
class Workshop:
    """An engine at work, and shorthands to give it jobs."""

    backend: FakeBackend
    line: Line
    memory: MemoryCache
    engine: Engine

    def submit(self, job: Job, num_items: int = 1) -> None:
        (place,) = self.line.reserve(num_items)
        place.put(job)

    def image(self, red: int) -> ImageInput:
        return ImageInput(f"digest-{red}", pixels(red), {})

    def caption(
        self,
        red: int,
        *prompts: str,
        params: GenerationParams = GREEDY,
        deadline: float | None = None,
        image: ImageInput | None = None,
    ) -> GenerateJob:
        """Puts a job in line and gives it back."""
        prompt_ids = tuple(self.backend.tokenize_prompt(prompt, params) for prompt in prompts or ("a photo",))
        job = GenerateJob(image or self.image(red), prompt_ids, params, Ticket(deadline))
        self.submit(job)
        return job

    def match(
        self,
        query: str | ImageInput,
        *candidates: str | ImageInput,
        mode: Mode = Mode.ITC,
        rerank_k: int = 128,
        top_k: int = 100,
    ) -> MatchJob:
        """Puts a job in line and gives it back."""
        job = MatchJob(query, candidates, mode, rerank_k, top_k, Ticket())
        self.submit(job)
        return job


@contextmanager
def workshop(
    backend: FakeBackend | None = None,
    *,
    max_rows: int = 64,
    max_items: int = 256,
    cache_bytes: int = 2**20,
    started: bool = True,
) -> Iterator[Workshop]:
    backend = backend or FakeBackend()
    rate = ServiceRate(jitter=lambda: 0.0)
    line, memory = Line(max_items, rate), MemoryCache(cache_bytes)
    engine = Engine(backend, line, memory, rate=rate, max_rows=max_rows, meter=Metrics())
    if started:
        engine.start()
    try:
        yield Workshop(backend, line, memory, engine)
    finally:
        backend.encode_gate.set()
        backend.decode_gate.set()
        engine.stop(TIMEOUT_S)


def text_of(job: GenerateJob, prompt: int = 0) -> str:
    """Waits for the best text of a job."""
    return job.ticket.future.result(TIMEOUT_S).value[prompt][0].text


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
        settings or Settings(), lambda: model, on_ready=lambda _: ready.set(), on_failure=on_failure
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
