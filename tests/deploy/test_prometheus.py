"""The profile `monitoring` on a real Docker engine: Prometheus finds the service and loads the rules.

Prometheus is Debian's, in an image made here; Grafana, which Debian does not have, is not started.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.documents import MONITORING
from tests.deploy.engine import (
    BUILD_LIMIT_S,
    DOCKER_MARKS,
    EngineUnavailableError,
    Stack,
    build_stack,
    fetch_images,
    run,
)
from tests.deploy.pictures import ask, draw_circle
from tests.deploy.test_monitoring import rule_groups
from tests.integration.processes import poll

pytestmark = DOCKER_MARKS

IMAGE = "blip2-test-prometheus"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    overlay = tmp_path_factory.mktemp("monitoring") / "compose.yml"
    overlay.write_text(f"services:\n  prometheus:\n    image: {IMAGE}\n")
    try:
        stack = build_stack(overlay)
        fetch_images()
    except EngineUnavailableError as exc:
        pytest.skip(str(exc))
    recipe = Path(__file__).with_name("prometheus.Dockerfile")
    command = ("docker", "build", "--network", "host", "--file", str(recipe), "--tag", IMAGE, str(MONITORING))
    run(*command, timeout_s=BUILD_LIMIT_S)
    try:
        stack.up("service", "prometheus")
        stack.wait_until_ready(stack.url())
        yield stack
    finally:
        stack.down()


def get(stack: Stack, path: str, **parameters: str) -> Any:
    url = f"{stack.url('prometheus', 9090)}/api/v1/{path}"
    try:
        response = httpx.get(url, params=parameters, trust_env=False)
    except httpx.TransportError:
        return None
    return response.json().get("data")


def query(stack: Stack, expression: str) -> list[Any]:
    data = get(stack, "query", query=expression)
    return data["result"] if data else []


def test_the_service_is_scraped(stack: Stack) -> None:
    ask(stack.url(), "/caption", {"image": draw_circle("red")})
    captions = 'blip2_requests_total{job="inference",route="/caption",status="200"} > 0'
    poll(lambda: query(stack, captions), 60, "a scrape")
    assert query(stack, 'blip2_model_info{name="tiny"} == 1')


def test_our_rules_are_loaded_and_in_order(stack: Stack) -> None:
    poll(lambda: get(stack, "rules"), 60, "Prometheus")
    poll(lambda: all(rule["health"] == "ok" for rule in loaded_rules(stack)), 60, "the first evaluation")
    names = {rule.get("record", rule.get("alert")) for group in rule_groups() for rule in group["rules"]}
    assert {rule["name"] for rule in loaded_rules(stack)} == names


def loaded_rules(stack: Stack) -> list[Any]:
    return [rule for group in get(stack, "rules")["groups"] for rule in group["rules"]]


def test_an_alert_awakes_when_the_service_is_gone(stack: Stack) -> None:
    is_awake = 'ALERTS{alertname="Blip2Down",alertstate="pending"}'
    poll(lambda: query(stack, 'up{job="inference"} == 1'), 60, "a scrape")
    poll(lambda: not query(stack, is_awake), 60, "quiet")
    stack.run("stop", "service")
    poll(lambda: query(stack, is_awake), 60, "the alert")
