"""The kustomizations of k8s/, rendered by `kubectl kustomize`."""

import pytest

from tests.deploy.documents import (
    KUBERNETES,
    Document,
    render,
    templates_of,
)

WHOLES = ("base", "overlays/cpu", "overlays/gpu", "overlays/production", "training")
SERVING = WHOLES[:-1]
GPU = ("overlays/gpu", "overlays/production")
COMPONENTS = sorted(path.name for path in (KUBERNETES / "components").iterdir())
INTERNET = "blip2-server/internet"  # label of pods that may reach the internet
MEBIBYTES = {"Mi": 1, "Gi": 1024}


@pytest.fixture(params=WHOLES)
def manifests(request: pytest.FixtureRequest) -> list[Document]:
    return render(KUBERNETES / request.param)


@pytest.fixture(params=SERVING)
def serving(request: pytest.FixtureRequest) -> list[Document]:
    return render(KUBERNETES / request.param)


@pytest.fixture(params=GPU)
def on_gpus(request: pytest.FixtureRequest) -> list[Document]:
    return render(KUBERNETES / request.param)


def mebibytes(quantity: str) -> int:
    return int(quantity[:-2]) * MEBIBYTES[quantity[-2:]]


def inference(documents: list[Document]) -> Document:
    [container] = templates_of(documents)["inference"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container
