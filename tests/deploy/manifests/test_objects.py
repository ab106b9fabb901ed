"""Objects of k8s/: schemas, namespaces, images, settings and selectors."""

import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from tests.deploy.documents import (
    KUBERNETES,
    Document,
    build_settings,
    containers_of,
    environment_of,
    of_kind,
    read_compose,
    read_version,
    render,
    render_with,
    templates_of,
)
from tests.deploy.manifests.conftest import COMPONENTS, WHOLES, inference, mebibytes

pytestmark = pytest.mark.kubectl

SCHEMAS = Path(__file__).parents[1] / "schemas"


def check_schema(document: Document) -> None:
    """Raise ValidationError unless the schema accepts the object; unknown fields are errors."""
    custom = SCHEMAS / f"{document['kind']}.json"
    if custom.exists():
        jsonschema.validate(document, json.loads(custom.read_text()))
    else:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_every_folder_is_tested() -> None:
    found = {
        path.parent.relative_to(KUBERNETES).as_posix() for path in KUBERNETES.rglob("kustomization.yaml")
    }
    assert found == {*WHOLES, *(f"components/{name}" for name in COMPONENTS)}


def test_every_object_is_valid(manifests: list[Document]) -> None:
    for document in manifests:
        check_schema(document)


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_makes_valid_objects_of_the_base(component: str, tmp_path: Path) -> None:
    for document in render_with(tmp_path, component):
        check_schema(document)


@pytest.mark.parametrize("autoscale", ["autoscale", "autoscale-hpa"])
def test_all_components_fit_together(autoscale: str, tmp_path: Path) -> None:
    for document in render_with(tmp_path, "gpu", "monitoring", "image-urls", autoscale):
        check_schema(document)


@pytest.mark.parametrize("kind", ["Deployment", "ScaledObject", "PrometheusRule", "ServiceMonitor"])
def test_a_misspelt_field_would_be_found(kind: str) -> None:
    document = next(iter(of_kind(render(KUBERNETES / "overlays/production"), kind).values()))
    check_schema(document)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_schema(document | {"spec": document["spec"] | {"replica": 1}})


def test_the_overlay_that_the_readme_shows_has_the_last_word(tmp_path: Path) -> None:
    [text] = re.findall(r"```yaml\n(.*?)```", (KUBERNETES / "README.md").read_text(), flags=re.DOTALL)
    below = os.path.relpath(KUBERNETES / "overlays/gpu", tmp_path)
    (tmp_path / "kustomization.yaml").write_text(text.replace("../gpu", below))
    container = inference(render(tmp_path))
    assert container["image"].startswith("registry.example.org/team/blip2-server:")
    environment = environment_of(container, render(tmp_path))
    assert environment["BLIP2_MODEL"] == "Salesforce/blip2-flan-t5-xl"
    assert environment["BLIP2_DEVICE"] == "cuda"


def test_everything_is_in_one_namespace(manifests: list[Document]) -> None:
    assert {each["metadata"].get("namespace") for each in manifests if each["kind"] != "Namespace"} == {
        "blip2"
    }


def test_every_image_has_a_tag_that_stays(manifests: list[Document]) -> None:
    images = [
        each["image"] for template in templates_of(manifests).values() for each in containers_of(template)
    ]
    for image in images:
        assert re.fullmatch(r"(.+/)?[\w-]+(:\d[\w.-]+|@sha256:[0-9a-f]{64})", image), image


def test_the_images_are_those_that_compose_runs() -> None:
    for folder, variant in (("base", ""), ("overlays/cpu", ""), ("overlays/gpu", "-cuda")):
        documents = render(KUBERNETES / folder)
        assert inference(documents)["image"] == f"blip2-server:{read_version()}{variant}"
        [redis] = templates_of(documents)["redis"]["spec"]["containers"]
        assert redis["image"] == read_compose()["redis"]["image"]


def test_redis_runs_as_it_does_under_compose() -> None:
    compose = read_compose()["redis"]
    [redis] = templates_of(render(KUBERNETES / "base"))["redis"]["spec"]["containers"]
    differing = [each for each in zip(redis["args"], compose["command"], strict=True) if each[0] != each[1]]
    assert differing == [("$(REDISCLI_AUTH)", compose["environment"]["REDISCLI_AUTH"])]


def test_redis_fits_into_its_memory() -> None:
    [redis] = templates_of(render(KUBERNETES / "base"))["redis"]["spec"]["containers"]
    maxmemory = redis["args"][redis["args"].index("--maxmemory") + 1]
    assert int(maxmemory.removesuffix("mb")) < mebibytes(redis["resources"]["limits"]["memory"])


def test_every_variable_of_the_service_is_a_setting_with_a_good_value(serving: list[Document]) -> None:
    assert build_settings(environment_of(inference(serving), serving)).redis_url is not None


def test_every_selector_finds_the_pods_that_it_names(manifests: list[Document]) -> None:
    templates = templates_of(manifests)
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy", "ServiceMonitor"):
        for name, document in of_kind(manifests, kind).items():
            selector: Any = document["spec"].get("selector", document["spec"].get("podSelector"))
            if selector and name != "internet":  # an empty one finds all, and that one is for who needs it
                labels = selector.get("matchLabels", selector)
                found = [
                    each
                    for each in templates.values()
                    if labels.items() <= each["metadata"]["labels"].items()
                ]
                assert found, f"{kind}/{name}"
