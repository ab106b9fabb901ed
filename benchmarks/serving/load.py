"""The load generator: closed loops with a fixed concurrency, and open loops with Poisson arrivals."""

import asyncio
import collections
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import httpx
import numpy as np

from benchmarks.serving.requests import Request


class Outcome(StrEnum):
    """Outcome of a request; abandoned: the client stopped waiting for the response."""

    ANSWERED = "answered"
    REJECTED = "rejected"
    EXPIRED = "expired"
    ABANDONED = "abandoned"


_OUTCOMES = {200: Outcome.ANSWERED, 429: Outcome.REJECTED, 503: Outcome.REJECTED, 504: Outcome.EXPIRED}


class LoadError(Exception):
    """A run with an unexpected response, or with requests that cannot be accounted for."""


@dataclass(frozen=True, slots=True)
class RequestResult:
    """Outcome and times of one request.

    latency_s: since the request was due. finished_s: since the start of the run. lag_s: delay of the client.
    image_cached: field of the response; None if absent.
    """

    outcome: Outcome
    latency_s: float
    finished_s: float
    lag_s: float = 0.0
    texts: tuple[str, ...] = ()
    image_cached: bool | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """Results of one run in the order of the requests; seconds: until the last response."""

    results: tuple[RequestResult, ...]
    seconds: float

    def count(self, outcome: Outcome) -> int:
        return sum(result.outcome is outcome for result in self.results)

    def latencies_s(self, outcome: Outcome) -> list[float]:
        return [result.latency_s for result in self.results if result.outcome is outcome]

    def answered_per_s(self, *, since_s: float, until_s: float) -> float:
        """Compute the rate of responses in this part of the run."""
        times = [result.finished_s for result in self.results if result.outcome is Outcome.ANSWERED]
        return sum(since_s <= time_s < until_s for time_s in times) / (until_s - since_s)


async def closed_loop(url: str, requests: Sequence[Request], concurrency: int) -> Run:
    """Send the requests with `concurrency` callers, each of which waits for its response.

    Raise LoadError.
    """
    queue = collections.deque(enumerate(requests))
    results: dict[int, RequestResult] = {}

    async def call(client: httpx.AsyncClient, began: float) -> None:
        while queue:
            index, request = queue.popleft()
            results[index] = await _send(client, request, began, time.monotonic() - began, None)

    async with _client(url) as client:
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(call(client, began))
        seconds = time.monotonic() - began
    return _check_number([results[index] for index in sorted(results)], len(requests), seconds)


async def open_loop(url: str, requests: Sequence[Request], arrivals_s: Sequence[float], end_s: float) -> Run:
    """Send each request at its arrival time; abandon the unanswered ones at `end_s`.

    arrivals_s: ascending, in seconds since the start of the run, as `end_s`. Raise LoadError.
    """
    async with _client(url) as client:
        began = time.monotonic()
        tasks = []
        async with asyncio.TaskGroup() as group:
            for request, due_s in zip(requests, arrivals_s, strict=True):
                await asyncio.sleep(began + due_s - time.monotonic())
                tasks.append(group.create_task(_send(client, request, began, due_s, began + end_s)))
        seconds = time.monotonic() - began
    return _check_number([task.result() for task in tasks], len(arrivals_s), seconds)


def poisson_arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Sample arrival times of a Poisson process, conditioned on their number.

    The number is fixed at rate × seconds: in a short run, a random number would change the load.
    """
    times = np.random.default_rng(seed).uniform(0, seconds, round(rate * seconds))
    return [float(time_s) for time_s in np.sort(times)]


@asynccontextmanager
async def _client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False) as client:
        yield client


async def _send(
    client: httpx.AsyncClient, request: Request, began: float, due_s: float, deadline: float | None
) -> RequestResult:
    """Send one request; due_s and the times of the result are relative to `began`."""
    lag_s = time.monotonic() - began - due_s
    seconds = None if deadline is None else deadline - time.monotonic()
    response = None
    try:
        async with asyncio.timeout(seconds):
            response = await client.post(
                request.path, content=request.body, headers={"Content-Type": "application/json"}
            )
    except TimeoutError:
        finished_s = time.monotonic() - began
        return RequestResult(Outcome.ABANDONED, finished_s - due_s, finished_s, lag_s)
    finished_s = time.monotonic() - began
    outcome = _OUTCOMES.get(response.status_code)
    if outcome is None:
        raise LoadError(f"{request.path} returned {response.status_code}: {response.text[:300]}")
    result = RequestResult(outcome, finished_s - due_s, finished_s, lag_s)
    if outcome is not Outcome.ANSWERED:
        return result
    texts, image_cached = _parse(request, response.json())
    return replace(result, texts=texts, image_cached=image_cached)


def _parse(request: Request, answer: dict[str, Any]) -> tuple[tuple[str, ...], bool | None]:
    """Return the texts and the cache flag of a response. Raise LoadError if the texts have another length."""
    entries = answer["captions"] if "captions" in answer else answer["answers"]
    lengths = [entry["num_tokens"] for entry in entries]
    if lengths != [request.num_tokens] * request.num_outputs:
        raise LoadError(
            f"{request.path} returned texts of {lengths} tokens, {request.num_outputs} of "
            f"{request.num_tokens} were requested"
        )
    texts = tuple(entry["text"] if "text" in entry else entry["answer"] for entry in entries)
    return texts, answer.get("image_cached")


def _check_number(results: Sequence[RequestResult], num_sent: int, seconds: float) -> Run:
    run = Run(tuple(results), seconds)
    counts = {outcome.value: run.count(outcome) for outcome in Outcome}
    if sum(counts.values()) != num_sent:
        raise LoadError(f"{num_sent} requests were sent, the outcomes are {counts}")
    return run
