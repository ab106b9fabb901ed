"""The default settings fit the memory that the shipped manifests grant: computed, and tried."""

import asyncio
import json
import re
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
import pytest
import yaml

from benchmarks.attacks import hostile_files
from benchmarks.process_memory import resident_bytes
from service.image_decoding import SMALL_DECODE_BYTES
from service.runtime.settings import Settings
from tests.attacks.harness import MemoryWatch, bystander
from tests.attacks.memory_cgroup import memory_cgroup
from tests.integration.pictures import in_base64, picture
from tests.integration.processes import ServiceProcess

ROOT = Path(__file__).parents[2]
UNITS = {"Mi": 2**20, "Gi": 2**30, "m": 2**20, "g": 2**30}
# Measured with `tiny`: Python, torch and the model under load, without what the settings below bound.
BASE_BYTES = 650_000_000
PROCESS_BYTES = 20_000_000  # of a process that decodes images, beside what it decodes
IMAGE_BYTES = 3 * 224**2  # decoded, for most image encoders
PARSED_COPIES = 3  # of the one body that is parsed, beside the body itself (docs/serving.md)
CONNECTION_BYTES = 256 * 2**10  # read and not yet parsed
RUNNING_BYTES = 60_000_000  # pixels and features of the requests that run
NUM_UPLOADS = 29
MEGABYTE = b"A" * 1_000_000
JSON = {"Content-Type": "application/json"}


def k8s_limit_bytes() -> int:
    documents = yaml.safe_load_all((ROOT / "k8s/base/inference.yaml").read_text())
    (deployment,) = (document for document in documents if document["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return in_bytes(container["resources"]["limits"]["memory"])


def compose_limit_bytes() -> int:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    return in_bytes(services["service"]["mem_limit"])


def in_bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(\w+)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * UNITS[unit]


def test_the_sum_of_all_defaults_fits_the_shipped_limits() -> None:
    settings = Settings()
    bounded = {
        "processes": 2 * settings.preprocess_threads * PROCESS_BYTES,
        "small images": settings.preprocess_threads * SMALL_DECODE_BYTES,
        "large images": settings.decode_bytes,
        "uploads": settings.max_upload_bytes,
        "the body that is parsed": PARSED_COPIES * settings.max_body_bytes,
        "connections": settings.max_connections * CONNECTION_BYTES,
        "waiting": settings.max_waiting_bytes,
        "waiting in bulk": max(settings.max_waiting_bytes // 2, settings.max_candidates * IMAGE_BYTES),
        "cache": settings.cache_bytes,
        "KV cache": settings.kv_bytes_on("cpu"),
    }
    total = BASE_BYTES + RUNNING_BYTES + sum(bounded.values())
    assert total <= min(k8s_limit_bytes(), compose_limit_bytes()), bounded


@pytest.mark.serial
async def test_the_worst_at_once_stays_within_the_shipped_limit(tmp_path: Path) -> None:
    limit_bytes, sent = k8s_limit_bytes(), costly_requests()
    with memory_cgroup(limit_bytes) as group:
        service = ServiceProcess(tmp_path, model="tiny")
        try:
            group.add(service.process.pid)
            service.wait_ready()
            idle_bytes = resident_bytes(service.process.pid)
            with MemoryWatch(service) as memory, bystander(service):
                statuses = await send_together(service.url, sent)
            assert statuses <= {200, 413, 415, 422, 429}
            assert service.process.poll() is None
            assert group.num_kills == 0
            assert resident_bytes(service.process.pid) < idle_bytes + 450_000_000  # the cache is full
            assert memory.peak_bytes < limit_bytes
            service.terminate()
            assert service.wait() == 0
        finally:
            service.kill()


def costly_requests() -> list[tuple[str, bytes]]:
    """Return path and body of the costliest requests of each kind."""
    deep = partial(hostile_files.png, 6300, 6300, bit_depth=16, colour_type=6)
    files = [
        *[deep()] * 3,
        *[hostile_files.png(6300, 6300, colour_type=6)] * 6,
        hostile_files.png(1, 40_000_000),
        hostile_files.tiff_of_large_tile(),
        hostile_files.tiff_of_many_tiles(),
        *[hostile_files.jpeg_of_many_scans()] * 4,
    ]
    # A suffix makes each file another one; else one decoding would serve all.
    images = [in_base64(data + b"%d" % index) for index, data in enumerate(files)]
    small = [in_base64(picture(1000 + index, size=(16, 16))) for index in range(2000)]
    candidates = ({"images": each} for each in (small[::2], small[1::2]))
    questions = [f"{index} " * 60 for index in range(32)]
    heavy = {"image": images[0], "question": questions, "num_beams": 16, "max_new_tokens": 32}
    requests: dict[str, list[dict[str, object]]] = {
        "/caption": [{"image": image} for image in images],
        "/retrieve": [{"text": "a star", "candidates": each, "mode": "itm"} for each in candidates],
        "/vqa": [heavy] * 2,
    }
    return [(path, json.dumps(body).encode()) for path, each in requests.items() for body in each]


async def send_together(url: str, requests: list[tuple[str, bytes]]) -> set[int]:
    """Send all requests, and unfinished uploads beside them; return the statuses."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=200, limits=limits) as client:
        posts = (client.post(path, content=body, headers=JSON) for path, body in requests)
        uploads = (upload_in_part(url) for _ in range(NUM_UPLOADS))
        answers, _ = await asyncio.gather(asyncio.gather(*posts), asyncio.gather(*uploads))
    return {answer.status_code for answer in answers}


async def upload_in_part(url: str) -> None:
    """Send all but the end of a body of 58 MB, and leave once the service reads no further."""
    address = httpx.URL(url)
    _, writer = await asyncio.open_connection(address.host, address.port)
    head = "POST /caption HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 58000000"
    writer.write(f'{head}\r\n\r\n{{"image":"'.encode())
    with suppress(TimeoutError, OSError):
        async with asyncio.timeout(10):
            for _ in range(57):
                writer.write(MEGABYTE)
                await writer.drain()
    writer.transport.abort()
