"""The image and the compose file on a real Docker engine, asked through the published port."""

import io
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image, ImageDraw

from tests.deploy.engine import EngineUnavailableError, Stack, build_stack, fetch_base_images, find_compose
from tests.integration.pictures import in_base64
from tests.integration.processes import poll

pytestmark = [pytest.mark.docker, pytest.mark.slow]

BUILD_LIMIT_S = 900
READY_LIMIT_S = 120
USER_ID = "10001"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Service and Redis, up and ready; removed afterwards, the image kept for the next build."""
    try:
        stack = build_stack(find_compose())
        fetch_base_images()
    except EngineUnavailableError as exc:
        pytest.skip(str(exc))
    stack.run("build", "service", timeout_s=BUILD_LIMIT_S)
    try:
        stack.run("up", "--detach", timeout_s=READY_LIMIT_S)
        wait_until_ready(stack)
        yield stack
    finally:
        stack.run("down", "--volumes", "--remove-orphans")


def wait_until_ready(stack: Stack) -> None:
    url = stack.url()
    try:
        poll(lambda: is_ready(url), READY_LIMIT_S, f"readiness at {url}")
    except AssertionError as exc:
        raise AssertionError(f"{exc}\n{stack.run('logs', '--tail', '50')}") from None


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def ask(stack: Stack, path: str, body: dict[str, object]) -> dict[str, Any]:
    response = httpx.post(f"{stack.url()}{path}", json=body, timeout=60, trust_env=False)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def draw_circle(color: str) -> str:
    """Gives the PNG of a circle, in base64."""
    image = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(image).ellipse((24, 24, 72, 72), fill=color)
    file = io.BytesIO()
    image.save(file, "PNG")
    return in_base64(file.getvalue())


def num_keys(stack: Stack) -> int:
    return int(stack.execute("redis", "redis-cli", "dbsize"))


def test_a_caption_comes_through_the_published_port(stack: Stack) -> None:
    [caption] = ask(stack, "/caption", {"image": draw_circle("red")})["captions"]
    assert caption["text"].strip()


def test_a_question_is_answered_through_the_published_port(stack: Stack) -> None:
    question = "What color is the circle?"
    [answer] = ask(stack, "/vqa", {"image": draw_circle("blue"), "question": question})["answers"]
    assert answer["question"] == question
    assert answer["answer"].strip()


def test_an_image_seen_before_is_not_encoded_again(stack: Stack) -> None:
    body: dict[str, object] = {"image": draw_circle("green")}
    first, second = ask(stack, "/caption", body), ask(stack, "/caption", body)
    assert (first["image_cached"], second["image_cached"]) == (False, True)
    assert first["captions"] == second["captions"]


def test_the_engine_finds_the_container_healthy(stack: Stack) -> None:
    poll(lambda: stack.health("service") == "healthy", READY_LIMIT_S, "health")


def test_the_service_runs_as_a_user_who_can_write_to_tmp_only(stack: Stack) -> None:
    assert stack.execute("service", "id", "-u").strip() == USER_ID
    stack.execute("service", "touch", "/tmp/probe")
    with pytest.raises(AssertionError, match="Read-only file system"):
        stack.execute("service", "touch", "/opt/app/probe")


def test_redis_wants_its_password(stack: Stack) -> None:
    answer = stack.execute("redis", "env", "--unset=REDISCLI_AUTH", "redis-cli", "dbsize")
    assert "NOAUTH" in answer


def test_a_stop_is_clean_and_what_redis_holds_outlives_it(stack: Stack) -> None:
    keys_before = num_keys(stack)
    body: dict[str, object] = {"image": draw_circle("yellow")}
    first = ask(stack, "/caption", body)
    poll(lambda: num_keys(stack) > keys_before, 30, "a key in Redis")

    stack.run("stop", "service")
    state = stack.state("service")
    assert (state["Status"], state["ExitCode"]) == ("exited", 0)

    stack.run("start", "service")
    wait_until_ready(stack)
    again = ask(stack, "/caption", body)
    assert (first["image_cached"], again["image_cached"]) == (False, True)
