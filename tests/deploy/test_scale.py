"""Two replicas behind the proxy, on a real Docker engine: either may stop or die, and they share a cache."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.deploy.documents import COMPOSE_OF_SCALE, read_compose
from tests.deploy.engine import DOCKER_MARKS, EngineUnavailableError, Stack, build_stack, fetch_images, run
from tests.deploy.load import run_load
from tests.deploy.pictures import ask, draw_circle, post, shade
from tests.integration.processes import poll

pytestmark = DOCKER_MARKS

REPLICAS = (1, 2)
NUM_CLIENTS = 6  # of the load


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


def test_a_replica_that_stops_under_load_costs_no_request(stack: Stack) -> None:
    [victim, _] = stack.containers("service")
    with run_load(proxy_url(stack), count=NUM_CLIENTS, first_shade=20_000) as load:
        load.wait_for_outcomes(12)
        run("docker", "stop", victim)
        load.wait_for_outcomes(24)
        run("docker", "start", victim)
        load.wait_for_outcomes(12)
    assert set(load.outcomes) == {200}, load.outcomes
    wait_until_all_are_ready(stack)


def test_a_replica_that_is_killed_under_load_costs_the_requests_it_held_and_no_other(stack: Stack) -> None:
    [victim, _] = stack.containers("service")
    with run_load(proxy_url(stack), count=NUM_CLIENTS, first_shade=10_000) as load:
        load.wait_for_outcomes(12)
        run("docker", "kill", victim)
        load.wait_for_outcomes(24)
        run("docker", "start", victim)
        load.wait_for_outcomes(12)
    assert set(load.outcomes) <= {200, 502}, load.outcomes
    assert load.outcomes.count(502) <= NUM_CLIENTS, load.outcomes
    wait_until_all_are_ready(stack)


def test_a_request_whose_replica_dies_is_not_given_to_the_other(stack: Stack) -> None:
    containers = stack.containers("service")
    body = {
        "image": draw_circle(shade(30_000)),
        "question": [f"what is number {number}?" for number in range(32)],
        "num_beams": 16,
        "max_new_tokens": 200,
        "min_new_tokens": 200,
    }
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(post, proxy_url(stack), "/vqa", body)
        poll(lambda: any(num_running(stack, replica) for replica in REPLICAS), 60, "a replica that runs it")
        [busy] = [replica for replica in REPLICAS if num_running(stack, replica)]
        [idle] = set(REPLICAS) - {busy}
        port = stack.url(replica=busy).rpartition(":")[2]
        [victim] = [each for each in containers if f":{port}" in run("docker", "port", each)]
        run("docker", "kill", victim)
        assert answer.result(60).status_code == 502
    assert num_running(stack, idle) == 0
    assert num_requests(stack.url(replica=idle), "/vqa") == 0
    run("docker", "start", victim)
    wait_until_all_are_ready(stack)


def test_a_replica_that_is_down_costs_no_request(stack: Stack) -> None:
    [victim, _] = stack.containers("service")
    run("docker", "kill", victim)
    for index in range(6):
        ask(proxy_url(stack), "/caption", {"image": draw_circle(shade(40_000 + index))})
    run("docker", "start", victim)
    wait_until_all_are_ready(stack)


def num_running(stack: Stack, replica: int) -> float:
    text = httpx.get(f"{stack.url(replica=replica)}/metrics", trust_env=False).text
    [line] = [each for each in text.splitlines() if each.startswith("blip2_running ")]
    return float(line.split()[-1])


def num_requests(url: str, route: str) -> float:
    """Return the number of requests to a route, whatever their status."""
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    lines = [each for each in text.splitlines() if f'blip2_requests_total{{route="{route}"' in each]
    return sum(float(line.split()[-1]) for line in lines)


def wait_until_all_are_ready(stack: Stack) -> None:
    for replica in REPLICAS:
        stack.wait_until_ready(stack.url(replica=replica))
