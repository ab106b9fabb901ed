"""The client: closed loops of so many callers, and open loops whose arrivals wait for nobody."""

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
    """How a request ended. Abandoned: the client waited no longer."""

    ANSWERED = "answered"
    SHED = "shed"
    EXPIRED = "expired"
    ABANDONED = "abandoned"


_OUTCOMES = {200: Outcome.ANSWERED, 429: Outcome.SHED, 503: Outcome.SHED, 504: Outcome.EXPIRED}


class LoadError(Exception):
    """The run is void: an answer that must not be, or requests that cannot be accounted for."""


@dataclass(frozen=True, slots=True)
class Reply:
    """latency_s: since it was due. finished_s: since the run began. lag_s: how late the client sent it.

    image_cached: as the answer says; None where it does not.
    """

    outcome: Outcome
    latency_s: float
    finished_s: float
    lag_s: float = 0.0
    texts: tuple[str, ...] = ()
    image_cached: bool | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """What became of all requests of a run, in the order they were sent; seconds: until the last was done."""

    replies: tuple[Reply, ...]
    seconds: float

    def count(self, outcome: Outcome) -> int:
        return sum(reply.outcome is outcome for reply in self.replies)

    def latencies_s(self, outcome: Outcome) -> list[float]:
        return [reply.latency_s for reply in self.replies if reply.outcome is outcome]

    def answered_per_s(self, *, since_s: float, until_s: float) -> float:
        """Gives the rate of answers that came in this part of the run."""
        times = [reply.finished_s for reply in self.replies if reply.outcome is Outcome.ANSWERED]
        return sum(since_s <= at < until_s for at in times) / (until_s - since_s)


async def closed_loop(url: str, requests: Sequence[Request], concurrency: int) -> Run:
    """Has so many callers send the requests, each its next one when the last is answered.

    Raises LoadError.
    """
    queue = collections.deque(enumerate(requests))
    replies: dict[int, Reply] = {}

    async def call(client: httpx.AsyncClient, began: float) -> None:
        while queue:
            index, request = queue.popleft()
            replies[index] = await _send(client, request, began, time.monotonic() - began, None)

    async with _client(url) as client:
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(call(client, began))
        seconds = time.monotonic() - began
    return _accounted([replies[index] for index in sorted(replies)], len(requests), seconds)


async def open_loop(url: str, requests: Sequence[Request], arrivals_s: Sequence[float], end_s: float) -> Run:
    """Sends each request when it is due, whatever became of the others; gives up on all at `end_s`.

    arrivals_s: ascending, since the beginning, as `end_s` is. Raises LoadError.
    """
    async with _client(url) as client:
        began = time.monotonic()
        tasks = []
        async with asyncio.TaskGroup() as group:
            for request, due_s in zip(requests, arrivals_s, strict=True):
                await asyncio.sleep(began + due_s - time.monotonic())
                tasks.append(group.create_task(_send(client, request, began, due_s, began + end_s)))
        seconds = time.monotonic() - began
    return _accounted([task.result() for task in tasks], len(arrivals_s), seconds)


def poisson_arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Gives the times of arrivals that know nothing of each other.

    Their number is what the rate says: a Poisson process of which so much is known. Left to chance, it would
    make a load of another size in a run this short.
    """
    times = np.random.default_rng(seed).uniform(0, seconds, round(rate * seconds))
    return [float(at) for at in np.sort(times)]


@asynccontextmanager
async def _client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False) as client:
        yield client


async def _send(
    client: httpx.AsyncClient, request: Request, began: float, due_s: float, give_up_at: float | None
) -> Reply:
    """Sends one request; due_s and the times of the reply are since `began`."""
    lag_s = time.monotonic() - began - due_s
    seconds = None if give_up_at is None else give_up_at - time.monotonic()
    response = None
    try:
        async with asyncio.timeout(seconds):
            response = await client.post(
                request.path, content=request.body, headers={"Content-Type": "application/json"}
            )
    except TimeoutError:
        finished_s = time.monotonic() - began
        return Reply(Outcome.ABANDONED, finished_s - due_s, finished_s, lag_s)
    finished_s = time.monotonic() - began
    outcome = _OUTCOMES.get(response.status_code)
    if outcome is None:
        raise LoadError(f"{request.path} was answered {response.status_code}: {response.text[:300]}")
    reply = Reply(outcome, finished_s - due_s, finished_s, lag_s)
    if outcome is not Outcome.ANSWERED:
        return reply
    texts, image_cached = _read(request, response.json())
    return replace(reply, texts=texts, image_cached=image_cached)


def _read(request: Request, answer: dict[str, Any]) -> tuple[tuple[str, ...], bool | None]:
    """Takes the texts out of an answer; raises LoadError where it holds not what it should."""
    entries = answer["captions"] if "captions" in answer else answer["answers"]
    lengths = [entry["num_tokens"] for entry in entries]
    if lengths != [request.num_tokens] * request.num_texts:
        raise LoadError(
            f"{request.path} gave texts of {lengths} tokens, {request.num_texts} of {request.num_tokens} "
            "were asked for"
        )
    texts = tuple(entry["text"] if "text" in entry else entry["answer"] for entry in entries)
    return texts, answer.get("image_cached")


def _accounted(replies: Sequence[Reply], num_sent: int, seconds: float) -> Run:
    run = Run(tuple(replies), seconds)
    counts = {outcome.value: run.count(outcome) for outcome in Outcome}
    if sum(counts.values()) != num_sent:
        raise LoadError(f"{num_sent} requests were sent, and {counts} came of them")
    return run
