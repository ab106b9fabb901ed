"""Workloads of k8s/: probes, shutdown, resources, replicas, GPUs and training."""

from pathlib import Path

import pytest

from service.api.app import create_app
from service.model_backend import Backend
from service.runtime.settings import Settings
from tests.deploy.documents import (
    CLOSING_S,
    KUBERNETES,
    Document,
    build_settings,
    containers_of,
    environment_of,
    of_kind,
    render,
    render_with,
    templates_of,
)
from tests.deploy.manifests.conftest import GPU, INTERNET, inference, mebibytes

pytestmark = pytest.mark.kubectl

PROBES = {"startupProbe": "/startupz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}


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
