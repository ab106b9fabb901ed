"""Rules of the compose files, without an engine; test_stack.py and test_scale.py start them."""

import re
from pathlib import Path

import pytest
import yaml

from tests.deploy.documents import (
    CLOSING_S,
    COMPOSE_FILE,
    COMPOSE_OF_GPU,
    COMPOSE_OF_SCALE,
    ROOT,
    SERVICE_DOCKERFILE,
    Document,
    build_settings,
    read_compose,
    read_dockerfile,
    read_version,
)

SERVICES = read_compose()
ON_GPU = read_compose(COMPOSE_OF_GPU)["service"]
PROXY = read_compose(COMPOSE_OF_SCALE)["proxy"]
CONTAINERS = SERVICES | {"proxy": PROXY}
MONITORING = ("prometheus", "grafana")


def seconds(text: str) -> int:
    match = re.fullmatch(r"(\d+)s", text)
    assert match, f"{text!r} is not in seconds"
    return int(match[1])


def mebibytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)mb?", text)
    assert match, f"{text!r} is not in megabytes"
    return int(match[1])


def redis_options() -> dict[str, str]:
    program, *options = SERVICES["redis"]["command"]
    assert program == "redis-server"
    return dict(zip(options[::2], options[1::2], strict=True))


def targets_of(path: Path) -> list[str]:
    return [rest.split()[-1] for name, rest in read_dockerfile(path) if name == "FROM"]


def test_every_variable_of_the_service_is_a_setting_with_a_good_value() -> None:
    settings = build_settings(SERVICES["service"]["environment"])
    assert settings.redis_url is not None
    assert build_settings(ON_GPU["environment"]).device == "cuda"


def test_the_service_and_the_health_check_know_the_password_of_redis() -> None:
    password = redis_options()["--requirepass"]
    assert SERVICES["service"]["environment"]["BLIP2_REDIS_URL"] == f"redis://:{password}@redis:6379/0"
    assert SERVICES["redis"]["environment"]["REDISCLI_AUTH"] == password


@pytest.mark.parametrize("name", CONTAINERS)
def test_what_is_published_is_so_on_loopback_only_and_redis_not_at_all(name: str) -> None:
    ports = CONTAINERS[name].get("ports", [])
    assert len(ports) == (name != "redis")
    assert all(port.startswith("127.0.0.1:") for port in ports)


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_image_has_a_tag_that_stays(name: str) -> None:
    assert re.fullmatch(r"[\w/-]+:v?\d+\.\d+[\w.-]*", CONTAINERS[name]["image"])


def test_the_service_is_of_this_version_and_built_for_its_device() -> None:
    for service, variant, target in ((SERVICES["service"], "", "cpu"), (ON_GPU, "-cuda", "cuda")):
        assert service["image"] == f"blip2-server:{read_version()}{variant}"
        assert service["build"]["target"] == target
        assert target in targets_of(SERVICE_DOCKERFILE)


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_is_read_only_and_without_privileges(name: str) -> None:
    service = CONTAINERS[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid"} & set(service)


@pytest.mark.parametrize("name", CONTAINERS)
def test_what_is_mounted_is_a_named_volume_or_a_file_of_ours_that_is_only_read(name: str) -> None:
    volumes = yaml.safe_load(COMPOSE_FILE.read_text())["volumes"]
    for mount in CONTAINERS[name].get("volumes", ()):
        source, _target, *mode = mount.split(":")
        if source in volumes:
            continue
        assert (ROOT / source).is_file()
        assert mode == ["ro"]


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_has_bounded_memory(name: str) -> None:
    assert CONTAINERS[name]["mem_limit"]


def test_monitoring_comes_only_where_it_is_asked_for() -> None:
    assert {name for name in SERVICES if SERVICES[name].get("profiles") == ["monitoring"]} == set(MONITORING)
    assert not {"service", "redis"} & {name for name in SERVICES if "profiles" in SERVICES[name]}


def test_the_service_is_given_time_to_drain() -> None:
    service = SERVICES["service"]
    drain_s = build_settings(service["environment"]).drain_timeout_ms / 1000
    assert seconds(service["stop_grace_period"]) > drain_s + CLOSING_S
    assert seconds(PROXY["stop_grace_period"]) >= seconds(service["stop_grace_period"])


def test_the_service_waits_for_a_redis_that_answers() -> None:
    assert SERVICES["service"]["depends_on"] == {"redis": {"condition": "service_healthy"}}
    assert "redis-cli ping" in SERVICES["redis"]["healthcheck"]["test"][1]


def test_redis_is_a_cache_with_bounded_memory_and_nothing_on_disk() -> None:
    options = redis_options()
    assert options["--maxmemory-policy"] == "allkeys-lfu"
    assert (options["--save"], options["--appendonly"]) == ("", "no")
    assert mebibytes(options["--maxmemory"]) < mebibytes(SERVICES["redis"]["mem_limit"])


def test_an_image_is_built_with_the_network_of_the_host() -> None:
    assert SERVICES["service"]["build"]["network"] == "host"


def test_weights_of_the_hub_are_kept_in_a_volume() -> None:
    [mount] = ON_GPU["volumes"]
    volume, target = mount.split(":")
    assert volume in yaml.safe_load(COMPOSE_OF_GPU.read_text())["volumes"]
    [home] = re.findall(r"HF_HOME=(\S+)", SERVICE_DOCKERFILE.read_text())
    assert target == home


def test_a_gpu_is_reserved() -> None:
    [device] = ON_GPU["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def test_replicas_do_not_take_all_cores_each() -> None:
    replicas = read_compose(COMPOSE_OF_SCALE)["service"]
    assert build_settings(replicas["environment"]).num_threads == 1


def test_replicas_without_ports_of_their_own_are_told_so() -> None:
    replicas: Document = yaml.safe_load(COMPOSE_OF_SCALE.read_text())["services"]["service"]
    assert replicas["scale"] == 2
    assert replicas["labels"]["published"].startswith("${PUBLISH_PORT:?set PUBLISH_PORT=0")


def test_the_proxy_takes_bodies_as_large_as_the_service_does() -> None:
    text = (ROOT / "docker" / "proxy.conf").read_text()
    [megabytes] = re.findall(r"client_max_body_size (\d+)m;", text)
    assert int(megabytes) * 2**20 == build_settings({}).max_body_bytes


def test_the_proxy_gives_to_another_replica_only_what_the_first_has_not_begun() -> None:
    text = (ROOT / "docker" / "proxy.conf").read_text()
    locations = dict(re.findall(r"location ([^{]+?) \{(.*?)\n        \}", text, flags=re.DOTALL))
    retried = {
        name: set(re.findall(r"proxy_next_upstream ([^;]+);", body)[0].split())
        for name, body in locations.items()
    }
    # "error" and "timeout" include a replica that dies amid a request; without non_idempotent no POST.
    for conditions in retried.values():
        assert "non_idempotent" not in conditions or conditions.isdisjoint({"error", "timeout"})
    assert retried["~ ^/(caption|vqa|retrieve)$"] == {"http_429", "http_503", "non_idempotent"}
    assert retried["@unsent"] == {"error", "timeout"}
    assert re.search(r"proxy_connect_timeout 2s;.*proxy_read_timeout 600s;", text, flags=re.DOTALL)
