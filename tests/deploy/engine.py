"""A real Docker engine, controlled by the command-line tools of a user."""

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.deploy.documents import COMPOSE_FILE, ROOT, SERVICE_DOCKERFILE, read_compose, read_dockerfile
from tests.integration.processes import poll

ENABLE = "then: .venv/bin/python -m pytest -m docker tests/deploy"
BUILD_LIMIT_S = 900
READY_LIMIT_S = 120
# The first test of a file may build images.
DOCKER_MARKS = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(2 * BUILD_LIMIT_S)]


class EngineUnavailableError(Exception):
    """No container can run here; the message contains the reason and the command that enables it."""


def find_compose() -> tuple[str, ...]:
    """Return the compose command of this machine; version 2 is preferred to version 1.

    Raise EngineUnavailableError without an engine or without compose.
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


def fetch_images(*others: str) -> None:
    """Pull the base images and the images of the other services, unless they are on this machine.

    Raise EngineUnavailableError if an image is missing and cannot be pulled.
    """
    stages = [rest.split() for name, rest in read_dockerfile(SERVICE_DOCKERFILE) if name == "FROM"]
    bases = {words[0] for words in stages} - {words[-1] for words in stages}
    for image in sorted(bases | {read_compose()["redis"]["image"], *others}):
        if not _succeeds("docker", "image", "inspect", image) and not _succeeds("docker", "pull", image):
            raise EngineUnavailableError(
                f"the image {image} is not here and cannot be pulled; "
                f"enable with: docker pull {image}, {ENABLE}"
            )


@dataclass(frozen=True, slots=True)
class Stack:
    """The containers of the compose files, under their own project name."""

    compose: tuple[str, ...]
    project: str
    files: Sequence[Path]
    environment: Mapping[str, str]

    def run(self, *arguments: str, timeout_s: float = 120) -> str:
        """Run a compose command; raise AssertionError with its output if it fails."""
        files = [word for path in self.files for word in ("--file", str(path))]
        command = (*self.compose, *files, "--project-directory", str(ROOT), "--project-name", self.project)
        return run(*command, *arguments, environment=self.environment, timeout_s=timeout_s)

    def up(self, *services: str) -> None:
        """Build the image of the service and start containers."""
        self.run("build", "service", timeout_s=BUILD_LIMIT_S)
        self.run("up", "--detach", *services, timeout_s=2 * READY_LIMIT_S)

    def down(self) -> None:
        self.run("down", "--volumes", "--remove-orphans")

    def wait_until_ready(self, url: str) -> None:
        try:
            poll(lambda: _is_ready(url), READY_LIMIT_S, f"readiness at {url}")
        except AssertionError as exc:
            raise AssertionError(f"{exc}\n{self.run('logs', '--tail', '50')}") from None

    def containers(self, service: str) -> list[str]:
        return self.run("ps", "--all", "--quiet", service).split()

    def container(self, service: str) -> str:
        [container] = self.containers(service)
        return container

    def url(self, service: str = "service", port: int = 8000, *, replica: int = 1) -> str:
        """Return the published address of a service; the engine chooses the port at each start."""
        address = self.run("port", f"--index={replica}", service, str(port)).strip()
        return f"http://{address}"

    def execute(self, service: str, *command: str) -> str:
        return run("docker", "exec", self.container(service), *command)

    def state(self, service: str) -> dict[str, object]:
        state: dict[str, object] = json.loads(
            run("docker", "inspect", "--format", "{{json .State}}", self.container(service))
        )
        return state

    def health(self, service: str) -> object:
        health = self.state(service)["Health"]
        assert isinstance(health, dict)
        return health["Status"]


def build_stack(*overlays: Path) -> Stack:
    """Build a stack with a random name and free ports, so that several can run at once.

    Raise EngineUnavailableError.
    """
    ports = dict.fromkeys(("PUBLISH_PORT", "PROXY_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT"), "0")
    name = f"blip2-test-{uuid.uuid4().hex[:8]}"
    return Stack(find_compose(), name, (COMPOSE_FILE, *overlays), os.environ | ports)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _succeeds(*command: str) -> bool:
    done = subprocess.run(command, capture_output=True, check=False, timeout=600)
    return done.returncode == 0


def run(*command: str, environment: Mapping[str, str] | None = None, timeout_s: float = 120) -> str:
    """Run a command to its end; raise AssertionError with its output if it fails."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=timeout_s
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout
