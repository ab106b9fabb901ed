"""Cache keys: only the same file under the same model hits; several services share one Redis."""

import io
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from model.packing import can_pack
from tests.builders import save_random_checkpoint
from tests.integration.pictures import in_base64
from tests.integration.processes import RedisProcess, ServiceProcess, poll, service

pytestmark = pytest.mark.redis

FP32 = {"dtype": "float32", "cache_bytes": 0}


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def grey() -> Image.Image:
    """Return a grey image, which is equal in every mode; it is not square."""
    levels = np.random.default_rng(7).integers(0, 256, (36, 48), dtype=np.uint8)
    return Image.fromarray(levels)


def noise(seed: int) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (36, 48, 3), dtype=np.uint8)
    return Image.fromarray(levels)


PICTURES = {
    "one": png(noise(1)),
    "another of its size": png(noise(2)),
    "turned": png(noise(1).transpose(Image.Transpose.ROTATE_90)),
    "transposed": png(noise(1).transpose(Image.Transpose.TRANSPOSE)),
    "in grey": png(grey()),
    "the grey in RGB": png(grey().convert("RGB")),
    "the grey with alpha": png(grey().convert("LA")),
    "the grey with a palette": png(grey().convert("P")),
    "the grey in one bit": png(grey().convert("1")),
}


def ask(server: ServiceProcess, data: bytes) -> dict[str, Any]:
    response = httpx.post(f"{server.url}/caption", json={"image": in_base64(data)}, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def ask_and_store(server: ServiceProcess, data: bytes) -> dict[str, Any]:
    """Request a caption, and wait for the asynchronous write to Redis."""
    written = 'blip2_cache_writes_total{result="written"}'
    before = server.metric(written)
    answer = ask(server, data)
    poll(lambda: server.metric(written) > before, 30, "the entry")
    return answer


@pytest.fixture(scope="module")
def services(
    random_checkpoint: Path, redis: RedisProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, ServiceProcess]]:
    """Start services on one Redis, and `alone` without any cache."""
    root = tmp_path_factory.mktemp("keys")
    other = save_random_checkpoint(root / "other", seed=1)
    kinds: dict[str, dict[str, Any]] = {
        "alone": {"model": random_checkpoint, **FP32},
        "first": {"model": random_checkpoint, **FP32, "redis_url": redis.url},
        "replica": {"model": random_checkpoint, **FP32, "redis_url": redis.url},
        "other weights": {"model": other, **FP32, "redis_url": redis.url},
        "other type": {
            "model": random_checkpoint,
            "dtype": "bfloat16",
            "cache_bytes": 0,
            "redis_url": redis.url,
        },
        "other size": {"model": random_checkpoint, **FP32, "image_size": 48, "redis_url": redis.url},
    }
    if can_pack(torch.bfloat16):
        kinds["other Q-Former"] = {**kinds["first"], "qformer_dtype": "bfloat16"}
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(service(root / name.replace(" ", "-"), **settings))
            for name, settings in kinds.items()
        }


def test_no_picture_gets_the_answer_of_another(services: dict[str, ServiceProcess]) -> None:
    for name, data in PICTURES.items():
        answer = ask(services["first"], data)
        assert answer["image_cached"] is False, name
        assert answer["captions"] == ask(services["alone"], data)["captions"], name


def test_the_same_picture_is_found_by_a_replica_and_by_nobody_else(
    services: dict[str, ServiceProcess],
) -> None:
    data = png(noise(50))
    computed = ask_and_store(services["first"], data)
    found = ask(services["replica"], data)
    assert found["image_cached"] is True
    assert found["timings_ms"]["vision"] == found["timings_ms"]["qformer"] == 0
    assert found["captions"] == computed["captions"]
    for name in services.keys() - {"first", "replica"}:
        assert ask(services[name], data)["image_cached"] is False, name


def test_a_hit_skips_vision_and_qformer(services: dict[str, ServiceProcess]) -> None:
    data, replica = png(noise(51)), services["replica"]
    ask_and_store(services["first"], data)
    before = [replica.metric(f'blip2_batch_rows_sum{{stage="{stage}"}}') for stage in ("vision", "qformer")]
    assert ask(replica, data)["image_cached"] is True
    after = [replica.metric(f'blip2_batch_rows_sum{{stage="{stage}"}}') for stage in ("vision", "qformer")]
    assert after == before
