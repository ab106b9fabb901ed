"""k8s/base rendered by kubectl, as a user applies it."""

import shutil
import subprocess

import pytest
import yaml

from tests.deploy.documents import (
    BASE,
    Document,
    container_of,
    literals_of,
    of_kind,
    read_kustomization,
    read_version,
)

pytestmark = pytest.mark.kubectl


@pytest.fixture(scope="module")
def rendered() -> list[Document]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed; enable with: apt-get install kubernetes-client")
    done = subprocess.run(
        ["kubectl", "kustomize", BASE], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def test_everything_is_in_the_namespace_that_is_rendered_with_it(rendered: list[Document]) -> None:
    [namespace] = of_kind(rendered, "Namespace")
    assert {each["metadata"].get("namespace", namespace) for each in rendered} == {namespace}
    assert sum("namespace" in each["metadata"] for each in rendered) == len(rendered) - 1


def test_the_pod_takes_its_settings_from_the_generated_map(rendered: list[Document]) -> None:
    container = container_of(of_kind(rendered, "Deployment")["inference"])
    [source] = container["envFrom"]
    settings = of_kind(rendered, "ConfigMap")[source["configMapRef"]["name"]]
    assert settings["data"] == literals_of(read_kustomization())


def test_the_pod_runs_the_image_of_this_version(rendered: list[Document]) -> None:
    container = container_of(of_kind(rendered, "Deployment")["inference"])
    assert container["image"] == f"blip2-server:{read_version()}"
