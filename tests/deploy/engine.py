"""A real Docker engine, driven by the command lines that a user has."""

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.deploy.documents import COMPOSE_FILE, ROOT, SERVICE_DOCKERFILE, read_compose, read_dockerfile
from tests.integration.processes import poll

ENABLE = "then: .venv/bin/python -m pytest -m docker tests/deploy"
BUILD_LIMIT_S = 900
READY_LIMIT_S = 120


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


def fetch_images(*others: str) -> None:
    """Has the images that ours is built from and runs beside, from this machine or from its registry.

    Raises EngineUnavailableError where one cannot be had.
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
    """The containers of the compose files under a project name of their own."""

    compose: tuple[str, ...]
    project: str
    files: Sequence[Path]
    environment: Mapping[str, str]

    def run(self, *arguments: str, timeout_s: float = 120) -> str:
        """Runs a compose command; raises AssertionError with its output where it fails."""
        files = [word for path in self.files for word in ("--file", str(path))]
        command = (*self.compose, *files, "--project-directory", str(ROOT), "--project-name", self.project)
        return run(*command, *arguments, environment=self.environment, timeout_s=timeout_s)

    def up(self, *services: str) -> None:
        """Builds the service's image and starts containers."""
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
        """Where a service is published now: the engine picks the port at each start."""
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
    """A stack that clashes with no other: a random name, and ports that are free when it starts.

    Raises EngineUnavailableError.
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
    """Runs a command to its end; raises AssertionError with its output where it fails."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=timeout_s
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout
