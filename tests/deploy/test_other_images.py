"""The training image and the GPU image of the service, built and run on a real Docker engine."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.documents import ROOT, SERVICE_DOCKERFILE, TRAINING_DOCKERFILE
from tests.deploy.engine import (
    BUILD_LIMIT_S,
    DOCKER_MARKS,
    EngineUnavailableError,
    fetch_images,
    find_compose,
    run,
)

pytestmark = DOCKER_MARKS


@pytest.fixture(scope="module", autouse=True)
def engine() -> None:
    try:
        find_compose()
        fetch_images()
    except EngineUnavailableError as exc:
        pytest.skip(str(exc))


def build(dockerfile: Path, *options: str) -> str:
    """Return a unique image name; the build cache is shared."""
    name = f"blip2-test-{uuid.uuid4().hex[:8]}"
    file = ("--file", str(dockerfile), "--tag", name)
    run("docker", "build", "--network", "host", *file, *options, str(ROOT), timeout_s=BUILD_LIMIT_S)
    return name


@pytest.fixture(scope="module")
def training() -> Iterator[str]:
    name = build(TRAINING_DOCKERFILE)
    yield name
    run("docker", "rmi", name)


def test_the_training_image_draws_scenes_without_privileges(training: str) -> None:
    hardened = ("--read-only", "--tmpfs", "/tmp", "--tmpfs", "/runs:uid=10001", "--cap-drop", "ALL")
    script = "python -m training scenes --count 2 --out /runs/scenes 2>/dev/null && ls /runs/scenes && id -u"
    seen = run("docker", "run", "--rm", *hardened, "--entrypoint", "sh", training, "-c", script)
    assert {"00000.png", "00001.png", "10001"} <= set(seen.split())


def test_the_training_image_has_the_torchrun_that_the_job_starts(training: str) -> None:
    command = "tini -- torchrun --standalone --nproc-per-node=2 --module training --help"
    words = ("--rm", "--entrypoint", "sh", training, "-c", command)
    assert run("docker", "run", *words).count("usage: python -m training") == 2


def test_the_image_for_gpus_asks_for_the_driver() -> None:
    name = build(SERVICE_DOCKERFILE, "--target", "cuda")
    config = json.loads(run("docker", "inspect", "--format", "{{json .Config}}", name))
    run("docker", "rmi", name)
    assert {"NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"} <= set(config["Env"])
    assert (config["User"], config["Entrypoint"]) == ("10001:10001", ["tini", "--"])
    assert config["Healthcheck"]["Test"][0] == "CMD"
