"""What the image, compose and Kubernetes files say, read as data."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from service.settings import PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "service.Dockerfile"
COMPOSE_FILE = ROOT / "docker-compose.yml"
BASE = ROOT / "k8s" / "base"
# After its drain the service lets go of engine, connections and Redis, each for some seconds at most.
CLOSING_S = 15

Document = dict[str, Any]


def read_version() -> str:
    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return version


def read_dockerfile() -> list[tuple[str, str]]:
    """Gives (instruction, arguments) in order, continued lines joined and comments dropped."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    instructions = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in instructions) if name]


def read_compose() -> dict[str, Document]:
    """Gives the services of the compose file as they are with no variable set."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE_FILE.read_text())
    services: dict[str, Document] = yaml.safe_load(text)["services"]
    return services


def read_kustomization() -> Document:
    kustomization: Document = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    return kustomization


def read_manifests() -> list[Document]:
    """Gives every object of the files that the base's kustomization names."""
    paths = [BASE / name for name in read_kustomization()["resources"]]
    return [document for path in paths for document in yaml.safe_load_all(path.read_text())]


def of_kind(documents: list[Document], kind: str) -> dict[str, Document]:
    """Gives the objects of one kind by their names."""
    return {each["metadata"]["name"]: each for each in documents if each["kind"] == kind}


def container_of(deployment: Document) -> Document:
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def literals_of(kustomization: Document) -> dict[str, str]:
    """Gives the names and values of every generated ConfigMap."""
    return dict(_pairs(kustomization))


def build_settings(environment: Mapping[str, str]) -> Settings:
    """Gives the settings that a container with these variables would run under.

    Raises AssertionError for a variable with our prefix that is no setting, ValidationError for a bad value.
    """
    ours = {
        name.removeprefix(PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(PREFIX)
    }
    unknown = set(ours) - set(Settings.model_fields)
    assert not unknown, f"no such settings: {sorted(unknown)}"
    return Settings.model_validate(ours)


def _pairs(kustomization: Document) -> Iterator[tuple[str, str]]:
    for generator in kustomization["configMapGenerator"]:
        for literal in generator["literals"]:
            name, _, value = literal.partition("=")
            yield name, value
