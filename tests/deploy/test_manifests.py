"""Rules of all manifests in k8s/, checked on the output of `kubectl kustomize`."""

import ipaddress
import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from service.app import create_app
from service.backend import Backend
from service.settings import PREFIX, Settings
from tests.deploy.documents import (
    CLOSING_S,
    KUBERNETES,
    SERVICE_DOCKERFILE,
    TRAINING_DOCKERFILE,
    Document,
    build_settings,
    containers_of,
    environment_of,
    of_kind,
    read_compose,
    read_dockerfile,
    read_version,
    render,
    render_with,
    templates_of,
)

pytestmark = pytest.mark.kubectl

WHOLES = ("base", "overlays/cpu", "overlays/gpu", "overlays/production", "training")
SERVING = WHOLES[:-1]
GPU = ("overlays/gpu", "overlays/production")
COMPONENTS = sorted(path.name for path in (KUBERNETES / "components").iterdir())
SCHEMAS = Path(__file__).parent / "schemas"
PROBES = {"startupProbe": "/startupz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}
MEBIBYTES = {"Mi": 1, "Gi": 1024}
INTERNET = "blip2-server/internet"
PRIVATE = (
    "10.1.2.3", "172.16.0.1", "172.31.255.254", "192.168.1.1", "100.64.0.1", "127.0.0.1", "0.0.0.0",
    "169.254.169.254", "224.0.0.1", "255.255.255.255", "::1", "::ffff:10.0.0.1", "fd00::1", "fe80::1",
    "ff02::1", "fd00:ec2::254", "2002:a00:1::1",
)  # fmt: skip


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


@pytest.mark.parametrize(("probe", "path"), PROBES.items())
def test_each_probe_asks_its_own_path(serving: list[Document], probe: str, path: str) -> None:
    container = inference(serving)
    assert container[probe]["httpGet"] == {"path": path, "port": "http"}
    assert [each["containerPort"] for each in container["ports"]] == [8000]


def test_the_service_answers_at_the_path_of_each_probe() -> None:
    def load() -> Backend:
        raise AssertionError("nothing is loaded to list the paths")

    assert set(PROBES.values()) <= set(create_app(Settings(), load).openapi()["paths"])


@pytest.mark.parametrize(("folder", "seconds"), [("base", 300), *((folder, 1800) for folder in GPU)])
def test_a_slow_load_is_waited_for(folder: str, seconds: int) -> None:
    probe = inference(render(KUBERNETES / folder))["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= seconds


def test_a_pod_leaves_the_endpoints_then_drains_and_only_then_is_killed(serving: list[Document]) -> None:
    container = inference(serving)
    program, pause_s = container["lifecycle"]["preStop"]["exec"]["command"]
    drain_s = build_settings(environment_of(container, serving)).drain_timeout_ms / 1000
    grace_s = templates_of(serving)["inference"]["spec"]["terminationGracePeriodSeconds"]
    assert program == "sleep"
    assert int(pause_s) < drain_s
    assert int(pause_s) + drain_s + CLOSING_S < grace_s


def test_every_container_has_requests_and_limits(manifests: list[Document]) -> None:
    for template in templates_of(manifests).values():
        for container in containers_of(template):
            resources = container["resources"]
            for each in ("requests", "limits"):
                assert {"cpu", "memory"} <= set(resources[each])
            assert mebibytes(resources["requests"]["memory"]) <= mebibytes(resources["limits"]["memory"])


def test_torch_takes_as_many_threads_as_the_container_has_processors(serving: list[Document]) -> None:
    container = inference(serving)
    settings = build_settings(environment_of(container, serving))
    assert settings.num_threads == int(container["resources"]["limits"]["cpu"])


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


def test_replicas_are_spread_over_nodes(serving: list[Document]) -> None:
    spread = templates_of(serving)["inference"]["spec"]["topologySpreadConstraints"]
    assert "kubernetes.io/hostname" in {each["topologyKey"] for each in spread}


def test_a_disruption_leaves_a_replica_and_still_lets_nodes_drain(serving: list[Document]) -> None:
    budget = of_kind(serving, "PodDisruptionBudget")["inference"]["spec"]
    assert budget["maxUnavailable"] < fewest_replicas(serving)


def fewest_replicas(documents: list[Document]) -> int:
    scaled = of_kind(documents, "ScaledObject")
    deployment = of_kind(documents, "Deployment")["inference"]["spec"]
    return int(scaled["inference"]["spec"]["minReplicaCount"] if scaled else deployment["replicas"])


@pytest.mark.parametrize("component", ["autoscale", "autoscale-hpa"])
def test_who_scales_the_replicas_is_not_undone_by_the_next_apply(component: str, tmp_path: Path) -> None:
    documents = render_with(tmp_path, component)
    assert "replicas" not in of_kind(documents, "Deployment")["inference"]["spec"]
    [scaler] = [each for each in documents if each["kind"] in ("ScaledObject", "HorizontalPodAutoscaler")]
    assert scaler["spec"]["scaleTargetRef"]["name"] == "inference"


def test_both_autoscalers_aim_at_the_same(tmp_path: Path) -> None:
    (tmp_path / "keda").mkdir()
    (tmp_path / "hpa").mkdir()
    keda = of_kind(render_with(tmp_path / "keda", "autoscale"), "ScaledObject")["inference"]["spec"]
    hpa = of_kind(render_with(tmp_path / "hpa", "autoscale-hpa"), "HorizontalPodAutoscaler")["inference"][
        "spec"
    ]
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (hpa["minReplicas"], hpa["maxReplicas"])
    assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
    [trigger], [metric] = keda["triggers"], hpa["metrics"]
    assert trigger["metadata"]["threshold"] == metric["pods"]["target"]["averageValue"]


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


def test_weights_are_verified_by_a_job_before_a_replica_starts(on_gpus: list[Document]) -> None:
    pod, job = templates_of(on_gpus)["inference"], templates_of(on_gpus)["prefetch"]
    [claim] = [each for each in pod["spec"]["volumes"] if each["name"] == "weights"]
    assert claim["persistentVolumeClaim"]["claimName"] in of_kind(on_gpus, "PersistentVolumeClaim")
    for container in containers_of(pod):
        [mount] = [each for each in container["volumeMounts"] if each["name"] == "weights"]
        assert mount["readOnly"] is True
    [wait] = pod["spec"]["initContainers"]
    [prefetch] = job["spec"]["containers"]
    script = prefetch["command"][-1]
    marker = '"$HF_HOME/verified/$1/$2"'
    steps = [f"rm -f {marker}", 'model.checkpoints fetch "$1" --revision "$2"', f"touch {marker}"]
    assert sorted(steps, key=script.index) == steps
    assert f"until [ -e {marker} ]" in wait["command"][-1]
    for names in (
        '"$BLIP2_MODEL" "$BLIP2_REVISION"',
        '"$BLIP2_RETRIEVAL_MODEL" "${BLIP2_RETRIEVAL_REVISION:-main}"',
    ):
        assert f"fetch {names}" in script
        assert f"wait_for {names}" in wait["command"][-1]
    variables = [environment_of(each, on_gpus) for each in (wait, prefetch, inference(on_gpus))]
    assert len({(each["BLIP2_MODEL"], each["BLIP2_REVISION"]) for each in variables}) == 1
    assert variables[1]["HF_HUB_OFFLINE"] == "0"  # what the image forbids to all others
    assert job["metadata"]["labels"][INTERNET] == "allowed"


def test_a_gpu_is_asked_for_and_none_is_needed_to_roll(on_gpus: list[Document]) -> None:
    deployment = of_kind(on_gpus, "Deployment")["inference"]["spec"]
    assert inference(on_gpus)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    tolerated = deployment["template"]["spec"]["tolerations"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in tolerated


def test_a_training_has_as_many_pods_as_torchrun_waits_for() -> None:
    documents = render(KUBERNETES / "training")
    job = of_kind(documents, "Job")["training"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    command = " ".join(container["command"])
    assert job["completionMode"] == "Indexed"
    assert f"--nnodes={job['completions']} " in command
    assert job["parallelism"] == job["completions"]
    assert f"--master-addr=training-0.{job['template']['spec']['subdomain']} " in command
    service = of_kind(documents, "Service")[job["template"]["spec"]["subdomain"]]["spec"]
    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
    assert f"--master-port={service['ports'][0]['port']} " in command
