"""The rules that docker-compose.yml keeps, read from the file; test_stack.py brings it up."""

import re

import pytest

from tests.deploy.documents import CLOSING_S, build_settings, read_compose, read_version

SERVICES = read_compose()


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


def test_every_variable_of_the_service_is_a_setting_with_a_good_value() -> None:
    settings = build_settings(SERVICES["service"]["environment"])
    assert settings.redis_url is not None


def test_the_service_and_the_health_check_know_the_password_of_redis() -> None:
    password = redis_options()["--requirepass"]
    assert SERVICES["service"]["environment"]["BLIP2_REDIS_URL"] == f"redis://:{password}@redis:6379/0"
    assert SERVICES["redis"]["environment"]["REDISCLI_AUTH"] == password


def test_the_service_is_published_on_loopback_only_and_redis_not_at_all() -> None:
    assert SERVICES["service"]["ports"] == ["127.0.0.1:8000:8000"]
    assert "ports" not in SERVICES["redis"]


def test_every_image_has_a_tag_that_stays() -> None:
    assert SERVICES["service"]["image"] == f"blip2-server:{read_version()}"
    assert re.fullmatch(r"redis:\d+\.\d+-\w+", SERVICES["redis"]["image"])


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_read_only_and_without_privileges(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "volumes"} & set(service)


def test_the_service_is_given_time_to_drain() -> None:
    service = SERVICES["service"]
    drain_s = build_settings(service["environment"]).drain_timeout_ms / 1000
    assert seconds(service["stop_grace_period"]) > drain_s + CLOSING_S


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
