"""The rules that k8s/base keeps, read from its files; test_kustomize.py renders them."""

import re
from typing import Any

import pytest

from service.app import create_app
from service.backend import Backend
from service.settings import PREFIX, Settings
from tests.deploy.documents import (
    BASE,
    CLOSING_S,
    Document,
    build_settings,
    container_of,
    literals_of,
    of_kind,
    read_compose,
    read_dockerfile,
    read_kustomization,
    read_manifests,
    read_version,
)

KUSTOMIZATION = read_kustomization()
MANIFESTS = read_manifests()
DEPLOYMENTS = of_kind(MANIFESTS, "Deployment")
PROBES = {"startupProbe": "/startupz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}
MEBIBYTES = {"Mi": 1, "Gi": 1024}


def pod_of(deployment: Document) -> Document:
    pod = deployment["spec"]["template"]["spec"]
    assert isinstance(pod, dict)
    return pod


def mebibytes(quantity: str) -> int:
    return int(quantity[:-2]) * MEBIBYTES[quantity[-2:]]


def environment_of_inference() -> dict[str, str]:
    plain = {
        each["name"]: each["value"]
        for each in container_of(DEPLOYMENTS["inference"])["env"]
        if "value" in each
    }
    return literals_of(KUSTOMIZATION) | plain


def test_the_kustomization_names_every_file_beside_it() -> None:
    beside = {path.name for path in BASE.iterdir()} - {"kustomization.yaml"}
    assert beside == set(KUSTOMIZATION["resources"])


def test_every_variable_of_the_service_is_a_setting_with_a_good_value() -> None:
    assert build_settings(environment_of_inference()).redis_url is not None


def test_the_password_comes_from_a_secret_that_is_not_in_the_repository() -> None:
    assert not of_kind(MANIFESTS, "Secret")
    assert "secretGenerator" not in KUSTOMIZATION
    for deployment in DEPLOYMENTS.values():
        references = [each["valueFrom"] for each in container_of(deployment)["env"] if "valueFrom" in each]
        assert references == [{"secretKeyRef": {"name": "redis-auth", "key": "password"}}]


def test_the_password_is_defined_before_the_url_that_holds_it() -> None:
    names = [each["name"] for each in container_of(DEPLOYMENTS["inference"])["env"]]
    # Kubernetes expands only what stands above.
    assert names.index("REDIS_PASSWORD") < names.index("BLIP2_REDIS_URL")


def test_no_service_of_the_cluster_can_be_taken_for_a_setting() -> None:
    for name in of_kind(MANIFESTS, "Service"):
        assert not f"{name}_PORT".upper().replace("-", "_").startswith(PREFIX)
    for deployment in DEPLOYMENTS.values():
        assert pod_of(deployment)["enableServiceLinks"] is False


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_every_pod_keeps_the_restricted_standard(name: str) -> None:
    pod, container = pod_of(DEPLOYMENTS[name]), container_of(DEPLOYMENTS[name])
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] >= 999
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert all(set(volume) == {"name", "emptyDir"} for volume in pod.get("volumes", []))
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_namespace_enforces_the_restricted_standard() -> None:
    namespace = of_kind(MANIFESTS, "Namespace")[KUSTOMIZATION["namespace"]]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_pod_runs_as_the_user_of_the_image() -> None:
    context = pod_of(DEPLOYMENTS["inference"])["securityContext"]
    [user] = [rest for name, rest in read_dockerfile() if name == "USER"]
    assert f"{context['runAsUser']}:{context['runAsGroup']}" == user


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_every_image_has_a_tag_that_stays(name: str) -> None:
    tags = {each["name"]: each["newTag"] for each in KUSTOMIZATION["images"]}
    image = container_of(DEPLOYMENTS[name])["image"]
    assert re.fullmatch(r"[\w-]+:\d[\w.-]+", f"{image}:{tags[image]}" if image in tags else image)


def test_the_images_are_those_of_the_compose_file() -> None:
    assert KUSTOMIZATION["images"] == [{"name": "blip2-server", "newTag": read_version()}]
    assert container_of(DEPLOYMENTS["redis"])["image"] == read_compose()["redis"]["image"]


def test_redis_runs_as_it_does_under_compose() -> None:
    compose = read_compose()["redis"]
    arguments = container_of(DEPLOYMENTS["redis"])["args"]
    differing = [each for each in zip(arguments, compose["command"], strict=True) if each[0] != each[1]]
    assert differing == [("$(REDISCLI_AUTH)", compose["environment"]["REDISCLI_AUTH"])]


@pytest.mark.parametrize(("probe", "path"), PROBES.items())
def test_each_probe_asks_its_own_path(probe: str, path: str) -> None:
    container = container_of(DEPLOYMENTS["inference"])
    assert container[probe]["httpGet"] == {"path": path, "port": "http"}
    assert [each["containerPort"] for each in container["ports"]] == [8000]


def test_the_service_answers_at_the_path_of_each_probe() -> None:
    def load() -> Backend:
        raise AssertionError("nothing is loaded to list the paths")

    assert set(PROBES.values()) <= set(create_app(Settings(), load).openapi()["paths"])


def test_a_slow_load_is_waited_for() -> None:
    probe = container_of(DEPLOYMENTS["inference"])["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 300


def test_a_pod_leaves_the_endpoints_then_drains_and_only_then_is_killed() -> None:
    deployment = DEPLOYMENTS["inference"]
    program, pause_s = container_of(deployment)["lifecycle"]["preStop"]["exec"]["command"]
    drain_s = build_settings(environment_of_inference()).drain_timeout_ms / 1000
    grace_s = pod_of(deployment)["terminationGracePeriodSeconds"]
    assert program == "sleep"
    assert int(pause_s) < drain_s
    assert int(pause_s) + drain_s + CLOSING_S < grace_s


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_every_container_has_requests_and_limits(name: str) -> None:
    resources = container_of(DEPLOYMENTS[name])["resources"]
    for each in ("requests", "limits"):
        assert set(resources[each]) == {"cpu", "memory"}
    assert mebibytes(resources["requests"]["memory"]) <= mebibytes(resources["limits"]["memory"])


def test_torch_takes_as_many_threads_as_the_container_has_processors() -> None:
    limits = container_of(DEPLOYMENTS["inference"])["resources"]["limits"]
    assert build_settings(environment_of_inference()).num_threads == int(limits["cpu"])


def test_redis_fits_into_its_memory() -> None:
    container = container_of(DEPLOYMENTS["redis"])
    maxmemory = container["args"][container["args"].index("--maxmemory") + 1]
    assert int(maxmemory.removesuffix("mb")) < mebibytes(container["resources"]["limits"]["memory"])


def test_every_selector_finds_the_pods_that_it_names() -> None:
    selectors: dict[str, Any] = {}
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
        for name, document in of_kind(MANIFESTS, kind).items():
            selectors[f"{kind}/{name}"] = document["spec"].get(
                "selector", document["spec"].get("podSelector")
            )
    assert selectors.pop("NetworkPolicy/default-deny") == {}
    for full_name, selector in selectors.items():
        labels = selector.get("matchLabels", selector)
        template = DEPLOYMENTS[full_name.partition("/")[2]]["spec"]["template"]
        assert labels.items() <= template["metadata"]["labels"].items(), full_name


def test_a_disruption_leaves_a_replica_and_still_lets_nodes_drain() -> None:
    budget = of_kind(MANIFESTS, "PodDisruptionBudget")["inference"]["spec"]
    assert budget["maxUnavailable"] < DEPLOYMENTS["inference"]["spec"]["replicas"]


def test_redis_is_reached_by_the_service_alone_and_reaches_nothing() -> None:
    policies = of_kind(MANIFESTS, "NetworkPolicy")
    redis, denied = policies["redis"]["spec"], policies["default-deny"]["spec"]
    assert denied["policyTypes"] == redis["policyTypes"] == ["Ingress", "Egress"]
    assert not {"ingress", "egress"} & set(denied)
    assert "egress" not in redis
    [rule] = redis["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "inference"}}}]
    assert rule["ports"] == [{"protocol": "TCP", "port": 6379}]


def test_the_service_reaches_redis_and_the_names_of_the_cluster_only() -> None:
    policy = of_kind(MANIFESTS, "NetworkPolicy")["inference"]["spec"]
    assert [each["port"] for rule in policy["egress"] for each in rule["ports"]] == [6379, 53, 53]
    assert all(rule["to"] for rule in policy["egress"])
    assert [each["port"] for rule in policy["ingress"] for each in rule["ports"]] == [8000]
