"""The settings: what is refused, and how the operator is told."""

import os

import pytest
from pydantic import ValidationError

from service.runtime.settings import SettingsError, load_settings

Environment = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without settings."""
    for name in list(os.environ):
        if name.upper().startswith("BLIP2_"):
            monkeypatch.delenv(name)
    return monkeypatch


def refusal() -> str:
    with pytest.raises(SettingsError) as refused:
        load_settings()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_defaults_serve_the_embedded_model_on_loopback() -> None:
    settings = load_settings()
    assert (settings.model, settings.device, settings.dtype) == ("tiny", "auto", "auto")
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.redis_url is None
    assert settings.max_image_pixels == 40_000_000


def test_variables_are_read_with_their_prefix(environment: Environment) -> None:
    environment.setenv("BLIP2_PORT", "9000")
    environment.setenv("BLIP2_DEVICE", "cuda:1")
    assert (load_settings().port, load_settings().device) == (9000, "cuda:1")


def test_an_empty_variable_is_as_good_as_none(environment: Environment) -> None:
    environment.setenv("BLIP2_REDIS_URL", "")
    environment.setenv("BLIP2_PORT", "")
    assert load_settings().redis_url is None
    assert load_settings().port == 8000


def test_a_misspelt_variable_is_an_error_that_names_the_nearest(environment: Environment) -> None:
    environment.setenv("BLIP2_MODLE", "tiny")
    assert refusal() == "BLIP2_MODLE is not a setting; the nearest is BLIP2_MODEL"


def test_a_variable_that_kubernetes_would_inject_is_an_error_too(environment: Environment) -> None:
    environment.setenv("BLIP2_SERVICE_HOST", "10.0.0.1")
    assert "BLIP2_SERVICE_HOST is not a setting" in refusal()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BLIP2_PORT", "65536"),
        ("BLIP2_PORT", "tcp://10.0.0.1:80"),
        ("BLIP2_DEVICE", "gpu"),
        ("BLIP2_DTYPE", "int4"),
        ("BLIP2_MAX_ROWS", "15"),
        ("BLIP2_MAX_WAITING", "0"),
        ("BLIP2_STALL_TIMEOUT_MS", "99"),
        ("BLIP2_LOG_LEVEL", "LOUD"),
        ("BLIP2_ROOT_PATH", "blip2"),
        ("BLIP2_ROOT_PATH", "https://a.example/blip2"),
        ("BLIP2_ROOT_PATH", "/a b"),
        ("BLIP2_ROOT_PATH", "/a//b"),
    ],
)
def test_a_value_out_of_bounds_is_named_with_its_variable(
    environment: Environment, name: str, value: str
) -> None:
    environment.setenv(name, value)
    assert refusal().startswith(f"{name} is {value!r}: ")


def test_all_wrong_values_are_named_at_once(environment: Environment) -> None:
    environment.setenv("BLIP2_PORT", "x")
    environment.setenv("BLIP2_MAX_ROWS", "y")
    assert "BLIP2_PORT" in refusal()
    assert "BLIP2_MAX_ROWS" in refusal()


def test_a_password_in_the_redis_url_is_never_shown(environment: Environment) -> None:
    environment.setenv("BLIP2_REDIS_URL", "http://:hunter2@redis:6379")
    assert "BLIP2_REDIS_URL has no scheme that is known" in refusal()
    assert "hunter2" not in refusal()
    environment.setenv("BLIP2_REDIS_URL", "rediss://:hunter2@redis:6379/0")
    assert "hunter2" not in repr(load_settings())
    environment.setenv("BLIP2_MAX_WAITING", "1")
    assert "hunter2" not in refusal()


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("redis://:hun#ter2@redis:6379/0", "percent-encode"),
        ("redis://:hun/ter2@redis:6379/0", "percent-encode"),
        ("redis://:hun?ter2@redis:6379/0", "percent-encode"),
        ("redis://:hun[ter2@redis:6379/0", "percent-encode"),
        ("redis://:hunter2@redis:port/0", "percent-encode"),
        ("redis://:hunter2@redis:70000/0", "percent-encode"),
        ("redis://:hunter2@redis:0/0", "percent-encode"),
        ("redis://:hunter2@/0", "percent-encode"),
        ("redis://", "percent-encode"),
        ("unix://", "percent-encode"),
        ("redis://:hunter2@redis/main", "database number"),
        ("redis://:hunter2@redis/0/1", "database number"),
        ("redis://:hunter2@redis/0?timeout=hunter2", "option that is not known"),
        ("redis://:hunter2@redis/0?socket_timeout=100", "option that is not known"),
        ("redis://:hunter2@redis/0?protocol=hunter2", "option whose value"),
        ("redis://:hunter2@redis/0?ssl_cert_reqs=none", "option whose value"),
        ("rediss://:hunter2@redis/0?ssl_cert_reqs=hunter2", "option whose value"),
        ("redis://:hunter2@redis/0 ", "white space"),
        ("redis://:hun ter2@redis/0", "white space"),
    ],
)
def test_a_redis_url_that_cannot_be_used_is_refused_without_its_value(
    environment: Environment, url: str, problem: str
) -> None:
    environment.setenv("BLIP2_REDIS_URL", url)
    assert refusal().startswith("BLIP2_REDIS_URL has") or refusal().startswith("BLIP2_REDIS_URL holds")
    assert problem in refusal()
    assert "ter2" not in refusal()


@pytest.mark.parametrize(
    "url",
    [
        "redis://redis",
        "redis://:hun%23%2F%3Fter2@redis:6379/15",
        "redis://user:hunter2@[::1]:6379",
        "rediss://:hunter2@redis:6380/0?ssl_cert_reqs=none",
        "unix:///run/redis.sock?db=1",
        "redis://redis/?db=2&protocol=3&client_name=blip2",
    ],
)
def test_a_redis_url_that_can_be_used_is_taken_as_it_is(environment: Environment, url: str) -> None:
    environment.setenv("BLIP2_REDIS_URL", url)
    redis_url = load_settings().redis_url
    assert redis_url is not None
    assert redis_url.get_secret_value() == url


@pytest.mark.parametrize(
    ("value", "root_path"), [("/blip2", "/blip2"), ("/a/b-c.d/", "/a/b-c.d"), ("/", None), ("", None)]
)
def test_a_root_path_may_end_with_a_slash(
    environment: Environment, value: str, root_path: str | None
) -> None:
    environment.setenv("BLIP2_ROOT_PATH", value)
    assert load_settings().root_path == root_path


@pytest.mark.parametrize(
    "wrong", ["a.example", "https://a.example/", "https://a.example/page", "null", "https://", "https://*"]
)
def test_an_origin_that_no_browser_sends_is_refused(environment: Environment, wrong: str) -> None:
    environment.setenv("BLIP2_CORS_ORIGINS", f"https://b.example:8443, {wrong}")
    assert refusal().startswith(f"BLIP2_CORS_ORIGINS holds {wrong!r}, which is no origin")


_AT_ONCE = {"BLIP2_MAX_IMAGES", "BLIP2_MAX_QUESTIONS", "BLIP2_MAX_CANDIDATES"}


@pytest.mark.parametrize("name", sorted(_AT_ONCE))
def test_a_request_that_could_never_be_admitted_is_refused_at_the_start(
    environment: Environment, name: str
) -> None:
    environment.setenv(name, "300")
    environment.setenv("BLIP2_MAX_WAITING", "256")
    for other in _AT_ONCE - {name}:
        environment.setenv(other, "1")
    assert refusal().startswith(f"{name} is 300 and BLIP2_MAX_WAITING is 256")


def test_an_image_that_could_never_arrive_is_refused_at_the_start(environment: Environment) -> None:
    environment.setenv("BLIP2_MAX_BODY_BYTES", "2048")
    assert "BLIP2_MAX_BODY_BYTES is 2048" in refusal()


def test_a_revision_of_no_second_model_is_refused(environment: Environment) -> None:
    environment.setenv("BLIP2_RETRIEVAL_REVISION", "v2")
    assert "BLIP2_RETRIEVAL_MODEL is not set; set both, or neither" in refusal()


def test_the_kv_cache_is_limited_by_device_unless_it_is_set(environment: Environment) -> None:
    assert load_settings().kv_bytes_on("cuda:1") == load_settings().kv_bytes_on("mps") == 4 * 2**30
    assert load_settings().kv_bytes_on("cpu") == 256 * 2**20
    environment.setenv("BLIP2_KV_BYTES", str(2**20))
    assert load_settings().kv_bytes_on("cuda") == load_settings().kv_bytes_on("cpu") == 2**20


def test_settings_do_not_change_afterwards() -> None:
    with pytest.raises(ValidationError):
        load_settings().port = 1
