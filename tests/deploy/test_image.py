"""What can be known about the image without building it; test_stack.py builds it."""

import json
import re
import shlex

from tests.deploy.documents import DOCKERFILE, ROOT, build_settings, read_dockerfile, read_version


def instructions(name: str) -> list[str]:
    return [rest for each, rest in read_dockerfile() if each == name]


def final_stage() -> list[tuple[str, str]]:
    every = read_dockerfile()
    last_from = max(index for index, (name, _) in enumerate(every) if name == "FROM")
    return every[last_from:]


def test_all_stages_start_from_the_same_literal_image() -> None:
    # The environment is copied from one stage to another: a different Python would not find it.
    assert {rest.split()[0] for rest in instructions("FROM")} == {"python:3.11-slim-bookworm"}


def test_the_classic_builder_can_read_the_file() -> None:
    assert "<<" not in DOCKERFILE.read_text()
    assert not [rest for rest in instructions("RUN") if rest.startswith("--")]


def test_the_container_runs_as_a_numbered_user_who_is_not_root() -> None:
    assert [rest for name, rest in final_stage() if name == "USER"] == ["10001:10001"]


def test_the_service_is_the_process_itself_and_not_a_shell_around_it() -> None:
    [command] = instructions("CMD")
    assert json.loads(command) == ["python", "-m", "service"]


def test_the_health_check_is_python_that_asks_readyz() -> None:
    [check] = instructions("HEALTHCHECK")
    program, flag, code = json.loads(check[check.index("CMD") + 3 :])
    assert (program, flag) == ("python", "-c")
    assert "'/readyz'" in code
    compile(code, "HEALTHCHECK", "exec")


def test_every_variable_of_the_image_is_a_setting_with_a_good_value() -> None:
    environment = dict(pair.split("=", 1) for rest in instructions("ENV") for pair in shlex.split(rest))
    settings = build_settings(environment)
    assert (settings.host, settings.port) == ("0.0.0.0", int(instructions("EXPOSE")[0]))


def test_the_label_tells_the_version_of_the_package() -> None:
    labels = dict(pair.split("=", 1) for rest in instructions("LABEL") for pair in shlex.split(rest))
    assert labels["org.opencontainers.image.version"] == read_version()
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_only_the_list_of_dependencies_stands_before_their_installation() -> None:
    every = read_dockerfile()
    build = next(
        index for index, each in enumerate(every) if each[0] == "FROM" and each[1].endswith(" AS build")
    )
    install = next(index for index, each in enumerate(every) if "--requirement" in each[1])
    copied = [rest for name, rest in every[build:install] if name == "COPY"]
    assert copied == ["--from=requirements /requirements.txt ./", "constraints.txt ./"]


def test_all_that_the_image_copies_is_sent_to_the_engine() -> None:
    allowed = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), flags=re.MULTILINE))
    copied = {
        source
        for rest in instructions("COPY")
        if not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert copied == allowed
