"""The image and the compose file on a real Docker engine, through the published port."""

from collections.abc import Iterator

import pytest

from tests.deploy.engine import (
    DOCKER_MARKS,
    READY_LIMIT_S,
    EngineUnavailableError,
    Stack,
    build_stack,
    fetch_images,
    run,
)
from tests.deploy.load import run_load
from tests.deploy.pictures import ask, draw_circle
from tests.integration.processes import poll

pytestmark = DOCKER_MARKS

USER_ID = "10001"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Start service and Redis, and remove them afterwards; the image is kept for the next build."""
    try:
        stack = build_stack()
        fetch_images()
    except EngineUnavailableError as exc:
        pytest.skip(str(exc))
    try:
        stack.up()
        stack.wait_until_ready(stack.url())
        yield stack
    finally:
        stack.down()


def num_keys(stack: Stack) -> int:
    return int(stack.execute("redis", "redis-cli", "dbsize"))


def is_cached(stack: Stack, color: str) -> bool:
    """Request a caption of a circle, and return whether its image was cached."""
    return bool(ask(stack.url(), "/caption", {"image": draw_circle(color)})["image_cached"])


def test_a_caption_comes_through_the_published_port(stack: Stack) -> None:
    [caption] = ask(stack.url(), "/caption", {"image": draw_circle("red")})["captions"]
    assert "red" in caption["text"]


def test_a_question_is_answered_through_the_published_port(stack: Stack) -> None:
    question = "What color is the circle?"
    [answer] = ask(stack.url(), "/vqa", {"image": draw_circle("blue"), "question": question})["answers"]
    assert (answer["question"], answer["answer"]) == (question, "blue")


def test_texts_are_ranked_through_the_published_port(stack: Stack) -> None:
    texts = [
        "a large solid green circle on a white background",
        "a large solid red circle on a white background",
    ]
    body: dict[str, object] = {"image": draw_circle("red"), "candidates": {"texts": texts}}
    best, _ = ask(stack.url(), "/retrieve", body)["results"]
    assert best["index"] == 1


def test_an_image_seen_before_is_not_encoded_again(stack: Stack) -> None:
    body: dict[str, object] = {"image": draw_circle("green")}
    first, second = ask(stack.url(), "/caption", body), ask(stack.url(), "/caption", body)
    assert (first["image_cached"], second["image_cached"]) == (False, True)
    assert first["captions"] == second["captions"]


def test_the_engine_finds_the_container_healthy(stack: Stack) -> None:
    poll(lambda: stack.health("service") == "healthy", READY_LIMIT_S, "health")


def test_the_service_runs_as_a_user_who_can_write_to_tmp_only(stack: Stack) -> None:
    assert stack.execute("service", "id", "-u").strip() == USER_ID
    stack.execute("service", "touch", "/tmp/probe")
    with pytest.raises(AssertionError, match="Read-only file system"):
        stack.execute("service", "touch", "/opt/app/probe")


def test_no_tool_that_builds_or_installs_is_in_the_image(stack: Stack) -> None:
    found = stack.execute("service", "sh", "-c", "command -v gcc cc make ninja g++ || true")
    assert found == ""
    with pytest.raises(AssertionError, match="No module named pip"):
        stack.execute("service", "python", "-m", "pip", "--version")


def test_redis_wants_its_password(stack: Stack) -> None:
    answer = stack.execute("redis", "env", "--unset=REDISCLI_AUTH", "redis-cli", "dbsize")
    assert "NOAUTH" in answer


def test_redis_killed_costs_its_hits_only_and_is_used_again_when_it_is_back(stack: Stack) -> None:
    run("docker", "kill", stack.container("redis"))
    assert not is_cached(stack, "orange")
    assert is_cached(stack, "orange")  # in the process itself
    stack.run("start", "redis")
    colors = (f"#ff{number:02x}ff" for number in range(256))

    def writes_again() -> bool:
        is_cached(stack, next(colors))
        return num_keys(stack) > 0

    poll(writes_again, 60, "an entry in the new Redis")


def test_a_stop_under_load_loses_no_request_that_was_accepted(stack: Stack) -> None:
    with run_load(stack.url(), first_shade=0, num_tokens=60) as load:
        load.wait_for_outcomes(12)
        load.stop()  # each has one more under way
        run("docker", "kill", "--signal", "TERM", stack.container("service"))
        num_before = len(load.outcomes)
    assert set(load.outcomes) <= {200, 503}  # the latter: it was being sent when the signal came
    assert 200 in load.outcomes[num_before:]
    poll(lambda: stack.state("service")["Status"] == "exited", 60, "the end")
    assert stack.state("service")["ExitCode"] == 0
    stack.run("start", "service")
    stack.wait_until_ready(stack.url())


def test_what_redis_holds_outlives_the_service(stack: Stack) -> None:
    keys_before = num_keys(stack)
    assert not is_cached(stack, "yellow")
    poll(lambda: num_keys(stack) > keys_before, 30, "a key in Redis")
    stack.run("restart", "service")
    stack.wait_until_ready(stack.url())
    assert is_cached(stack, "yellow")
