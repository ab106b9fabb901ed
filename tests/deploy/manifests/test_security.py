"""Security of k8s/: pod standards, secrets, users and network policies."""

import ipaddress
import re
from pathlib import Path

import pytest

from service.runtime.settings import PREFIX
from tests.deploy.documents import (
    KUBERNETES,
    SERVICE_DOCKERFILE,
    TRAINING_DOCKERFILE,
    Document,
    containers_of,
    of_kind,
    read_dockerfile,
    render,
    render_with,
    templates_of,
)
from tests.deploy.manifests.conftest import INTERNET, inference

pytestmark = pytest.mark.kubectl

PRIVATE = (
    "10.1.2.3", "172.16.0.1", "172.31.255.254", "192.168.1.1", "100.64.0.1", "127.0.0.1", "0.0.0.0",
    "169.254.169.254", "224.0.0.1", "255.255.255.255", "::1", "::ffff:10.0.0.1", "fd00::1", "fe80::1",
    "ff02::1", "fd00:ec2::254", "2002:a00:1::1",
)  # fmt: skip


def test_the_namespace_enforces_the_restricted_standard(serving: list[Document]) -> None:
    labels = of_kind(serving, "Namespace")["blip2"]["metadata"]["labels"]
    assert {labels[f"pod-security.kubernetes.io/{mode}"] for mode in ("enforce", "audit", "warn")} == {
        "restricted"
    }


def test_every_pod_keeps_the_restricted_standard(manifests: list[Document]) -> None:
    for template in templates_of(manifests).values():
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] >= 999
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        kinds = {kind for volume in pod.get("volumes", ()) for kind in set(volume) - {"name"}}
        assert kinds <= {"emptyDir", "persistentVolumeClaim"}
        for container in containers_of(template):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_what_is_written_to_has_a_bound(manifests: list[Document]) -> None:
    for template in templates_of(manifests).values():
        for volume in template["spec"].get("volumes", ()):
            if "emptyDir" in volume:
                assert volume["emptyDir"]["sizeLimit"]


def test_passwords_and_tokens_come_from_secrets_that_are_not_in_the_repository(
    manifests: list[Document],
) -> None:
    assert not of_kind(manifests, "Secret")
    for template in templates_of(manifests).values():
        for container in containers_of(template):
            named = [
                each for each in container.get("env", ()) if re.search("AUTH|PASSWORD|TOKEN", each["name"])
            ]
            assert all("secretKeyRef" in each["valueFrom"] for each in named)


def test_the_password_is_defined_before_the_url_that_holds_it(serving: list[Document]) -> None:
    names = [each["name"] for each in inference(serving)["env"]]
    # Kubernetes expands only what stands above.
    assert names.index("REDIS_PASSWORD") < names.index("BLIP2_REDIS_URL")


def test_no_service_of_the_cluster_can_be_taken_for_a_setting(manifests: list[Document]) -> None:
    for name in of_kind(manifests, "Service"):
        assert not f"{name}_PORT".upper().replace("-", "_").startswith(PREFIX)
    for template in templates_of(manifests).values():
        assert template["spec"]["enableServiceLinks"] is False


def test_the_pods_run_as_the_users_of_the_images() -> None:
    for folder, name, dockerfile in (
        ("overlays/gpu", "inference", SERVICE_DOCKERFILE),
        ("overlays/gpu", "prefetch", SERVICE_DOCKERFILE),
        ("training", "training", TRAINING_DOCKERFILE),
    ):
        context = templates_of(render(KUBERNETES / folder))[name]["spec"]["securityContext"]
        [user] = [rest for instruction, rest in read_dockerfile(dockerfile) if instruction == "USER"]
        assert f"{context['runAsUser']}:{context['runAsGroup']}" == user


def test_all_that_is_not_allowed_is_denied(serving: list[Document]) -> None:
    denied = of_kind(serving, "NetworkPolicy")["default-deny"]["spec"]
    assert denied == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_redis_is_reached_by_the_service_alone_and_reaches_nothing(serving: list[Document]) -> None:
    redis = of_kind(serving, "NetworkPolicy")["redis"]["spec"]
    assert redis["policyTypes"] == ["Ingress", "Egress"]
    assert "egress" not in redis
    [rule] = redis["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "inference"}}}]
    assert rule["ports"] == [{"protocol": "TCP", "port": 6379}]


def test_the_service_reaches_redis_and_the_names_of_the_cluster_only(serving: list[Document]) -> None:
    labels = templates_of(serving)["inference"]["metadata"]["labels"]
    assert INTERNET not in labels
    policies = of_kind(serving, "NetworkPolicy")
    applying = [
        policy["spec"]
        for policy in policies.values()
        if policy["spec"]["podSelector"].get("matchLabels", {}).items() <= labels.items()
    ]
    egress = [rule for policy in applying for rule in policy.get("egress", ())]
    assert [each["port"] for rule in egress for each in rule["ports"]] == [6379, 53, 53]
    assert all(rule["to"] for rule in egress)


def test_who_fetches_from_the_internet_reaches_nothing_inside(tmp_path: Path) -> None:
    documents = render_with(tmp_path, "image-urls")
    assert templates_of(documents)["inference"]["metadata"]["labels"][INTERNET] == "allowed"
    addresses, names = of_kind(documents, "NetworkPolicy")["internet"]["spec"]["egress"]
    assert {each["port"] for each in addresses["ports"]} == {80, 443}
    assert {each["port"] for each in names["ports"]} == {53}
    blocks = [each["ipBlock"] for each in addresses["to"]]

    def is_reached(address: str) -> bool:
        ip = ipaddress.ip_address(address)
        return any(
            ip in ipaddress.ip_network(block["cidr"])
            and not any(ip in ipaddress.ip_network(outside) for outside in block["except"])
            for block in blocks
        )

    assert not [address for address in PRIVATE if is_reached(address)]
    assert is_reached("1.1.1.1")
    assert is_reached("2606:4700::1111")
