"""Parsers of the Dockerfiles, compose files and Kubernetes manifests."""

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.runtime.settings import PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]
SERVICE_DOCKERFILE = ROOT / "docker" / "service.Dockerfile"
TRAINING_DOCKERFILE = ROOT / "docker" / "training.Dockerfile"
COMPOSE_FILE = ROOT / "docker-compose.yml"
COMPOSE_OF_GPU = ROOT / "docker" / "compose.gpu.yml"
COMPOSE_OF_SCALE = ROOT / "docker" / "compose.scale.yml"
MONITORING = ROOT / "docker" / "monitoring"
KUBERNETES = ROOT / "k8s"
# After the drain, closing the engine, the connections and Redis takes some seconds each.
CLOSING_S = 15

Document = dict[str, Any]


def read_version() -> str:
    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return version


def read_dockerfile(path: Path) -> list[tuple[str, str]]:
    """Return (instruction, arguments) in order, with continued lines joined and without comments."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    instructions = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in instructions) if name]


def read_compose(path: Path = COMPOSE_FILE) -> dict[str, Document]:
    """Return the services of a compose file, with the default of every variable."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", path.read_text())
    services: dict[str, Document] = yaml.safe_load(text)["services"]
    return services


@cache
def render(folder: Path) -> list[Document]:
    """Return all objects that `kubectl apply -k` would send; skip the test without kustomize 5."""
    if shutil.which("kubectl") is None or not _has_components():
        pytest.skip("no kubectl with kustomize 5; enable with: kubectl 1.27 or newer, from kubernetes.io")
    done = subprocess.run(
        ["kubectl", "kustomize", folder], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def render_with(folder: Path, *components: str) -> list[Document]:
    """Render the base with components, by a kustomization that is written to `folder`."""

    def relative(name: str) -> str:
        return os.path.relpath(KUBERNETES / name, folder)

    kustomization = {
        "namespace": "blip2",
        "resources": [relative("base")],
        "components": [relative(f"components/{name}") for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return render(folder)


def of_kind(documents: list[Document], kind: str) -> dict[str, Document]:
    """Return the objects of one kind by name."""
    return {each["metadata"]["name"]: each for each in documents if each["kind"] == kind}


def templates_of(documents: list[Document]) -> dict[str, Document]:
    """Return the pod templates of all workloads by the name of the workload."""
    return {
        each["metadata"]["name"]: each["spec"]["template"]
        for each in documents
        if "template" in each.get("spec", {})
    }


def containers_of(template: Document) -> list[Document]:
    return [*template["spec"].get("initContainers", ()), *template["spec"]["containers"]]


def environment_of(container: Document, documents: list[Document]) -> dict[str, str]:
    """Return the variables whose values are known without a cluster."""
    maps = of_kind(documents, "ConfigMap")
    environment: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        environment |= maps[source["configMapRef"]["name"]]["data"]
    return environment | {each["name"]: each["value"] for each in container.get("env", ()) if "value" in each}


def build_settings(environment: Mapping[str, str]) -> Settings:
    """Build the settings of a container with these variables.

    Raise AssertionError for an unknown setting, ValidationError for an invalid value.
    """
    values = {
        name.removeprefix(PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(PREFIX) and value
    }
    unknown = set(values) - set(Settings.model_fields)
    assert not unknown, f"unknown settings: {sorted(unknown)}"
    return Settings.model_validate(values)


@cache
def _has_components() -> bool:
    done = subprocess.run(
        ["kubectl", "version", "--client"], capture_output=True, text=True, check=False, timeout=60
    )
    version = re.search(r"Kustomize Version: v(\d+)", done.stdout)
    return version is not None and int(version[1]) >= 5
