"""The cache in a real Redis: shared by two services; failures of Redis change no response."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis as redis_client
import torch

from service.cache.wire import pack
from tests.builders import NUM_QUERY_TOKENS, QFORMER_WIDTH
from tests.integration.pictures import in_base64, picture
from tests.integration.processes import RedisProcess, ServiceProcess, poll, redis_server, service

pytestmark = pytest.mark.redis

QUERY_HITS = 'blip2_cache_requests_total{kind="query_output",result="hit",tier="redis"}'
QUERY_ERRORS = 'blip2_cache_requests_total{kind="query_output",result="error",tier="redis"}'


@pytest.fixture(scope="module")
def first(
    random_checkpoint: Path, redis: RedisProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    with service(tmp_path_factory.mktemp("first"), model=random_checkpoint, redis_url=redis.url) as started:
        caption(started, 0)  # connects
        yield started


@pytest.fixture(scope="module")
def second(
    random_checkpoint: Path, redis: RedisProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    """Start a service without an in-process cache, so that each request reads Redis."""
    directory = tmp_path_factory.mktemp("second")
    with service(directory, model=random_checkpoint, redis_url=redis.url, cache_bytes=0) as started:
        caption(started, 0)  # connects
        yield started


def caption(server: ServiceProcess, seed: int, salt: str = "") -> dict[str, Any]:
    body = {"image": in_base64(picture(seed, salt=salt))}
    response = httpx.post(f"{server.url}/caption", json=body, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def wait_for_keys(redis: RedisProcess, num_keys: int) -> None:
    """Wait for the asynchronous writes."""
    with redis_client.Redis.from_url(redis.url) as client:
        poll(lambda: client.dbsize() >= num_keys, 30, f"{num_keys} keys")


def flush(redis: RedisProcess) -> None:
    with redis_client.Redis.from_url(redis.url) as client:
        client.flushall()


def test_what_one_service_encoded_another_need_not(
    redis: RedisProcess, first: ServiceProcess, second: ServiceProcess
) -> None:
    flush(redis)
    computed = caption(first, 1)
    assert computed["image_cached"] is False
    wait_for_keys(redis, 1)
    hits = second.metric(QUERY_HITS)
    fetched = caption(second, 1)
    assert fetched["image_cached"] is True
    assert fetched["timings_ms"]["vision"] == 0
    assert fetched["captions"] == computed["captions"]
    assert second.metric(QUERY_HITS) == hits + 1


def test_retrieval_shares_its_encodings_too(
    redis: RedisProcess, first: ServiceProcess, second: ServiceProcess
) -> None:
    flush(redis)
    images = [in_base64(picture(seed, salt="retrieval")) for seed in range(3)]
    body = {"text": "a red star", "candidates": {"images": images}}
    computed = httpx.post(f"{first.url}/retrieve", json=body, timeout=60).json()
    wait_for_keys(redis, 6)
    fetched = httpx.post(f"{second.url}/retrieve", json=body, timeout=60).json()
    assert fetched["results"] == computed["results"]
    assert fetched["timings_ms"]["vision"] == 0
    assert computed["timings_ms"]["vision"] > 0
    # A caption can be made of the image features that retrieval left.
    answer = httpx.post(f"{second.url}/caption", json={"image": images[0]}, timeout=60).json()
    assert answer["image_cached"] is True
    assert answer["timings_ms"]["vision"] == 0


def test_entries_expire_and_hold_no_pickle(redis: RedisProcess, first: ServiceProcess) -> None:
    flush(redis)
    caption(first, 2, "ttl")
    wait_for_keys(redis, 1)
    with redis_client.Redis.from_url(redis.url) as client:
        (key,) = client.keys()
        assert 0 < client.ttl(key) <= 604_800
        assert client.get(key).startswith(b"BL2E")


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "garbage": lambda _: b"garbage",
    "cut": lambda whole: whole[:-1],
    "flipped": lambda whole: whole[:40] + bytes([whole[40] ^ 1]) + whole[41:],
    "pickled": lambda _: b"\x80\x04K\x01." * 20,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_corrupt_entry_is_computed_anew(
    redis: RedisProcess, first: ServiceProcess, second: ServiceProcess, damage: str
) -> None:
    flush(redis)
    computed = caption(first, 3, damage)
    wait_for_keys(redis, 1)
    with redis_client.Redis.from_url(redis.url) as client:
        (key,) = client.keys()
        client.set(key, DAMAGES[damage](client.get(key)))
    errors = second.metric(QUERY_ERRORS)
    again = caption(second, 3, damage)
    assert again["captions"] == computed["captions"]
    assert again["image_cached"] is False
    assert second.metric(QUERY_ERRORS) == errors + 1


def test_the_entry_of_another_image_is_computed_anew(
    redis: RedisProcess, first: ServiceProcess, second: ServiceProcess
) -> None:
    flush(redis)
    computed = caption(first, 5)
    wait_for_keys(redis, 1)
    with redis_client.Redis.from_url(redis.url) as client:
        (key,) = client.keys()
        caption(first, 6)
        wait_for_keys(redis, 2)
        (other,) = set(client.keys()) - {key}
        client.copy(other, key, replace=True)
    again = caption(second, 5)
    assert again["captions"] == computed["captions"]
    assert again["image_cached"] is False


def test_a_key_of_another_type_is_computed_anew(
    redis: RedisProcess, first: ServiceProcess, second: ServiceProcess
) -> None:
    flush(redis)
    computed = caption(first, 4, "type")
    wait_for_keys(redis, 1)
    with redis_client.Redis.from_url(redis.url) as client:
        (key,) = client.keys()
        client.delete(key)
        client.lpush(key, "a list")
    assert caption(second, 4, "type")["captions"] == computed["captions"]


def test_redis_killed_in_mid_run_changes_no_answer_and_comes_back(
    random_checkpoint: Path, first: ServiceProcess, tmp_path: Path
) -> None:
    with (
        redis_server() as own,
        service(tmp_path, model=random_checkpoint, redis_url=own.url, cache_bytes=0) as server,
    ):
        expected = [caption(first, seed)["captions"] for seed in range(20, 28)]
        before = [caption(server, seed)["captions"] for seed in range(20, 24)]
        own.kill()
        during = [caption(server, seed)["captions"] for seed in range(24, 28)]
        again = [caption(server, seed)["captions"] for seed in range(20, 28)]
        assert before + during == expected
        assert again == expected
        assert server.metric(QUERY_ERRORS) > 0
        assert server.metric("blip2_cache_breaker_open") == 1
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        own.start()
        hits = server.metric(QUERY_HITS)
        poll(lambda: caption(server, 20) and server.metric(QUERY_HITS) > hits, 60, "a hit in the new Redis")
        assert server.metric("blip2_cache_breaker_open") == 0
        own.freeze()
        assert [caption(server, seed)["captions"] for seed in range(20, 28)] == expected
        assert httpx.get(f"{server.url}/readyz").status_code == 200


def test_a_full_redis_is_read_and_changes_no_answer(
    random_checkpoint: Path, first: ServiceProcess, tmp_path: Path
) -> None:
    with (
        redis_server() as own,
        service(tmp_path, model=random_checkpoint, redis_url=own.url, cache_bytes=0) as server,
        redis_client.Redis.from_url(own.url) as client,
    ):
        kept = caption(server, 40)["captions"]
        wait_for_keys(own, 1)
        client.config_set("maxmemory", 1)  # bytes; nothing is evicted
        answers = [caption(server, seed)["captions"] for seed in range(41, 49)]
        assert answers == [caption(first, seed)["captions"] for seed in range(41, 49)]
        poll(lambda: server.metric('blip2_cache_writes_total{result="refused"}') >= 8, 30, "refused writes")
        again = caption(server, 40)
        assert (again["captions"], again["image_cached"]) == (kept, True)
        assert server.metric("blip2_cache_breaker_open") == 0
        client.config_set("maxmemory", 0)
        caption(server, 49)
        wait_for_keys(own, 2)


def test_redis_absent_at_the_start_is_no_reason_not_to_serve(
    random_checkpoint: Path, first: ServiceProcess, tmp_path: Path
) -> None:
    url = "redis://:secret-word@127.0.0.1:1/0"
    with service(tmp_path, model=random_checkpoint, redis_url=url) as server:
        assert caption(server, 1)["captions"] == caption(first, 1)["captions"]
        assert server.metric(QUERY_ERRORS) > 0
        assert "Redis does not answer" in server.errors
        server.terminate()
        assert server.wait() == 0
        assert "secret-word" not in server.errors + server.output


@pytest.mark.parametrize("url", ["redis://:secret-word@{place}", "redis://{place}"])
def test_a_wrong_password_is_named_as_the_reason(random_checkpoint: Path, tmp_path: Path, url: str) -> None:
    with redis_server() as own, redis_client.Redis.from_url(own.url) as client:
        client.config_set("requirepass", "another-word")
        place = own.url.removeprefix("redis://")
        with service(tmp_path, model=random_checkpoint, redis_url=url.format(place=place)) as server:
            caption(server, 1)
            assert "Redis refuses the user or the password of BLIP2_REDIS_URL" in server.errors
            assert "secret-word" not in server.errors


WRONG_TENSORS: dict[str, torch.Tensor] = {
    "another shape": torch.zeros(7, 5),
    "no elements": torch.zeros(0, 5),
    "not numbers": torch.full((NUM_QUERY_TOKENS, QFORMER_WIDTH), float("nan")),
    "another dtype": torch.zeros(NUM_QUERY_TOKENS, QFORMER_WIDTH, dtype=torch.float16),
}


@pytest.mark.parametrize("wrong", WRONG_TENSORS)
def test_an_entry_with_a_right_checksum_that_is_no_embedding_is_computed_anew_and_replaced(
    redis: RedisProcess, first: ServiceProcess, second: ServiceProcess, wrong: str
) -> None:
    flush(redis)
    computed = caption(first, 7, wrong)
    wait_for_keys(redis, 1)
    with redis_client.Redis.from_url(redis.url) as client:
        (key,) = client.keys()
        right = client.get(key)
        client.set(key, pack(key.decode(), WRONG_TENSORS[wrong]))
        again = caption(second, 7, wrong)
        assert (again["captions"], again["image_cached"]) == (computed["captions"], False)
        poll(lambda: client.get(key) == right, 30, "the right entry")
    assert "is not used and is deleted" in second.errors
