"""Two replicas behind the proxy, on a real Docker engine: either may stop, and they share a cache."""

from collections.abc import Iterator

import httpx
import pytest

from tests.deploy.documents import COMPOSE_OF_SCALE, read_compose
from tests.deploy.engine import DOCKER_MARKS, EngineUnavailableError, Stack, build_stack, fetch_images, run
from tests.deploy.load import run_load
from tests.deploy.pictures import ask, draw_circle
from tests.integration.processes import poll

pytestmark = DOCKER_MARKS

REPLICAS = (1, 2)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Start both replicas and the proxy in front of them."""
    try:
        stack = build_stack(COMPOSE_OF_SCALE)
        fetch_images(read_compose(COMPOSE_OF_SCALE)["proxy"]["image"])
    except EngineUnavailableError as exc:
        pytest.skip(str(exc))
    try:
        stack.up()
        for replica in REPLICAS:
            stack.wait_until_ready(stack.url(replica=replica))
        yield stack
    finally:
        stack.down()


def proxy_url(stack: Stack) -> str:
    return stack.url("proxy", 8080)


def num_captions(url: str) -> float:
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    [line] = [each for each in text.splitlines() if 'requests_total{route="/caption",status="200"}' in each]
    return float(line.split()[-1])


def num_keys(stack: Stack) -> int:
    return int(stack.execute("redis", "redis-cli", "dbsize"))


def test_the_proxy_asks_both(stack: Stack) -> None:
    urls = [stack.url(replica=replica) for replica in REPLICAS]
    before = [num_captions(url) for url in urls]

    def both_were_asked() -> bool:
        ask(proxy_url(stack), "/caption", {"image": draw_circle("red")})
        return all(num_captions(url) > count for url, count in zip(urls, before, strict=True))

    poll(both_were_asked, 60, "a caption by each replica")


def test_what_one_replica_encoded_the_other_need_not(stack: Stack) -> None:
    body: dict[str, object] = {"image": draw_circle("purple")}
    first, second = (stack.url(replica=replica) for replica in REPLICAS)
    keys_before = num_keys(stack)
    made = ask(first, "/caption", body)
    assert not made["image_cached"]
    poll(lambda: num_keys(stack) > keys_before, 30, "a key in Redis")
    hit = ask(second, "/caption", body)
    assert hit["image_cached"]
    assert hit["captions"] == made["captions"]


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_a_replica_that_goes_under_load_costs_no_request(stack: Stack, end: str) -> None:
    [victim, _] = stack.containers("service")
    first_shade = 10_000 if end == "kill" else 20_000
    with run_load(proxy_url(stack), first_shade=first_shade) as load:
        load.wait_for_outcomes(12)
        run("docker", end, victim)
        load.wait_for_outcomes(24)
        run("docker", "start", victim)
        load.wait_for_outcomes(12)
    assert set(load.outcomes) == {200}, load.outcomes
    for replica in REPLICAS:
        stack.wait_until_ready(stack.url(replica=replica))
