"""A real service on a faulty device, and concurrent requests."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.integration.pictures import in_base64, picture
from tests.integration.processes import ServiceProcess, service


@contextmanager
def faulty_service(directory: Path, **settings: Any) -> Iterator[ServiceProcess]:
    """Start a service whose device is controlled by files in `directory`; see `faulty_service`."""
    variables = {"FAULT_DIRECTORY": str(directory)}
    with service(directory, module="tests.faults.faulty_service", variables=variables, **settings) as started:
        yield started


def request(seed: int, **fields: object) -> dict[str, Any]:
    return {"image": in_base64(picture(seed)), "num_beams": 2, **fields}


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> httpx.Response:
    return await client.post("/caption", json=body)


async def ask_together(url: str, payloads: list[dict[str, Any]]) -> list[httpx.Response]:
    async with client_of(url) as client:
        return list(await asyncio.gather(*(ask(client, body) for body in payloads)))


def client_of(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None))


def texts_of(answers: list[httpx.Response]) -> list[str]:
    return [answer.json()["captions"][0]["text"] for answer in answers]


async def is_red(client: httpx.AsyncClient) -> bool:
    """Return whether /livez fails."""
    return (await client.get("/livez")).status_code == 503


async def has(client: httpx.AsyncClient, *samples: str) -> bool:
    """Return whether the metrics contain these lines."""
    return set(samples) <= set((await client.get("/metrics")).text.splitlines())
