"""Four requests of many images at once: the memory stays bounded, and hot embeddings stay in the cache."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.attacks.harness import MemoryWatch, bystander
from tests.integration.pictures import in_base64, picture
from tests.integration.processes import ServiceProcess, service

pytestmark = [pytest.mark.serial, pytest.mark.slow]

NUM_REQUESTS = 4
NUM_IMAGES = 100  # of each
CACHE_BYTES = 2 * 2**20  # half of the embeddings of these images
MAX_GROWTH_BYTES = 500 * 2**20


def retrieve(running: ServiceProcess, first: int, num_images: int = NUM_IMAGES) -> int:
    images = [in_base64(picture(first + index)) for index in range(num_images)]
    body: dict[str, Any] = {"text": "a red circle", "candidates": {"images": images}, "rerank_k": 16}
    return httpx.post(f"{running.url}/retrieve", json=body, timeout=120).status_code


def is_cached(running: ServiceProcess, index: int) -> bool:
    body = {"image": in_base64(picture(index)), "num_beams": 1, "max_new_tokens": 2}
    answer = httpx.post(f"{running.url}/caption", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return bool(answer.json()["image_cached"])


def test_large_retrievals_drive_out_no_hot_embedding_and_hold_little(tmp_path: Path) -> None:
    with service(tmp_path, model="tiny", cache_bytes=CACHE_BYTES, num_threads=1) as running:
        hot = range(100_000, 100_010)
        for index in hot:
            is_cached(running, index)
        with bystander(running), MemoryWatch(running) as memory, ThreadPoolExecutor(NUM_REQUESTS) as threads:
            starts = [10_000 * (number + 1) for number in range(NUM_REQUESTS)]
            large = [threads.submit(retrieve, running, start) for start in starts]
            while not all(each.done() for each in large):
                assert all(is_cached(running, index) for index in hot)  # they stay hot
            assert [each.result() for each in large] == [200] * NUM_REQUESTS
        assert all(is_cached(running, index) for index in hot)
        assert memory.growth_bytes < MAX_GROWTH_BYTES


def test_as_many_images_as_allowed_from_several_callers_refuse_no_small_request(tmp_path: Path) -> None:
    with service(tmp_path, model="tiny") as running:
        with bystander(running), ThreadPoolExecutor(4) as threads:
            large = [threads.submit(retrieve, running, 10_000 * number, 1000) for number in range(4)]
            statuses = [each.result() for each in large]
        assert set(statuses) == {200, 429}
