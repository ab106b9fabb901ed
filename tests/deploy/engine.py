"""A real Docker engine, driven by the command lines that a user has."""

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from tests.deploy.documents import COMPOSE_FILE, ROOT, read_compose, read_dockerfile

ENABLE = "then: .venv/bin/python -m pytest -m docker tests/deploy"


class EngineUnavailableError(Exception):
    """Containers cannot be run here; the message says why, and the command that changes it."""


def find_compose() -> tuple[str, ...]:
    """Gives the compose command of this machine, version 2 before version 1.

    Raises EngineUnavailableError where no engine answers, or there is no compose.
    """
    if shutil.which("docker") is None or not _succeeds("docker", "info"):
        raise EngineUnavailableError(
            f"no Docker engine answers; enable with: apt-get install docker.io docker-compose, {ENABLE}"
        )
    for command in (("docker", "compose"), ("docker-compose",)):
        if shutil.which(command[0]) and _succeeds(*command, "version"):
            return command
    raise EngineUnavailableError(
        f"docker has no compose; enable with: apt-get install docker-compose, {ENABLE}"
    )


def fetch_base_images() -> None:
    """Has the images that ours are built from and run beside, from this machine or from its registry.

    Raises EngineUnavailableError where one cannot be had.
    """
    images = {rest.split()[0] for name, rest in read_dockerfile() if name == "FROM"}
    for image in sorted(images | {read_compose()["redis"]["image"]}):
        if not _succeeds("docker", "image", "inspect", image) and not _succeeds("docker", "pull", image):
            raise EngineUnavailableError(
                f"the image {image} is not here and cannot be pulled; "
                f"enable with: docker pull {image}, {ENABLE}"
            )


@dataclass(frozen=True, slots=True)
class Stack:
    """The containers of docker-compose.yml under a project name of their own."""

    compose: tuple[str, ...]
    project: str
    environment: Mapping[str, str]

    def run(self, *arguments: str, timeout_s: float = 120) -> str:
        """Runs a compose command; raises AssertionError with its output where it fails."""
        command = (*self.compose, "--file", str(COMPOSE_FILE), "--project-name", self.project, *arguments)
        return _run(*command, environment=self.environment, timeout_s=timeout_s)

    def container(self, service: str) -> str:
        return self.run("ps", "--all", "--quiet", service).strip()

    def url(self) -> str:
        """Where the service is published now: the engine picks the port at each start."""
        return f"http://{self.run('port', 'service', '8000').strip()}"

    def execute(self, service: str, *command: str) -> str:
        return _run("docker", "exec", self.container(service), *command)

    def state(self, service: str) -> dict[str, object]:
        state: dict[str, object] = json.loads(
            _run("docker", "inspect", "--format", "{{json .State}}", self.container(service))
        )
        return state

    def health(self, service: str) -> object:
        health = self.state(service)["Health"]
        assert isinstance(health, dict)
        return health["Status"]


def build_stack(compose: tuple[str, ...]) -> Stack:
    """A stack that clashes with no other: a random name, and a port that is free when it starts."""
    environment = os.environ | {"PUBLISH_PORT": "0"}
    return Stack(compose, f"blip2-test-{uuid.uuid4().hex[:8]}", environment)


def _succeeds(*command: str) -> bool:
    done = subprocess.run(command, capture_output=True, check=False, timeout=600)
    return done.returncode == 0


def _run(*command: str, environment: Mapping[str, str] | None = None, timeout_s: float = 120) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=timeout_s
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout
