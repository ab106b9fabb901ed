"""Rules of the Dockerfiles, without an engine; test_stack.py builds the image of the service."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.deploy.documents import (
    ROOT,
    SERVICE_DOCKERFILE,
    TRAINING_DOCKERFILE,
    build_settings,
    read_dockerfile,
    read_version,
)

DOCKERFILES = (SERVICE_DOCKERFILE, TRAINING_DOCKERFILE)
BASE_IMAGE = "python:3.11-slim-bookworm"


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.name)
def dockerfile(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def instructions(path: Path, name: str) -> list[str]:
    return [rest for each, rest in read_dockerfile(path) if each == name]


def pairs(path: Path, name: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in instructions(path, name) for pair in shlex.split(rest))


def test_all_stages_start_from_the_same_literal_image(dockerfile: Path) -> None:
    # The environment is copied from one stage to another: a different Python would not find it.
    stages = {rest.split()[2] for rest in instructions(dockerfile, "FROM") if " AS " in rest}
    assert {rest.split()[0] for rest in instructions(dockerfile, "FROM")} - stages == {BASE_IMAGE}


def test_the_classic_builder_can_read_the_file(dockerfile: Path) -> None:
    assert "<<" not in dockerfile.read_text()
    assert not [rest for rest in instructions(dockerfile, "RUN") if rest.startswith("--")]


def test_the_package_index_of_torch_is_not_fixed(dockerfile: Path) -> None:
    assert 'TORCH_INDEX_URL=""' in instructions(dockerfile, "ARG")


def test_the_targets_are_those_that_are_documented() -> None:
    targets = [rest.split()[2] for rest in instructions(SERVICE_DOCKERFILE, "FROM") if " AS " in rest]
    # The classic builder makes all stages before the one that is wanted.
    assert targets == ["requirements", "build", "cpu", "cuda"]
    assert f"FROM {BASE_IMAGE} AS cpu" in SERVICE_DOCKERFILE.read_text()


def test_the_container_runs_as_a_numbered_user_who_is_not_root(dockerfile: Path) -> None:
    assert instructions(dockerfile, "USER") == ["10001:10001"]


def test_process_1_hands_signals_on_to_the_program_itself(dockerfile: Path) -> None:
    [entry_point], [command] = instructions(dockerfile, "ENTRYPOINT"), instructions(dockerfile, "CMD")
    module = "service" if dockerfile == SERVICE_DOCKERFILE else "training"
    words = [*json.loads(entry_point), *json.loads(command)]
    assert words[:5] == ["tini", "--", "python", "-m", module]


def test_the_health_check_is_python_that_asks_readyz() -> None:
    [check] = instructions(SERVICE_DOCKERFILE, "HEALTHCHECK")
    program, flag, code = json.loads(check[check.index("CMD") + 3 :])
    assert (program, flag) == ("python", "-c")
    assert "'/readyz'" in code
    compile(code, "HEALTHCHECK", "exec")


def test_every_variable_of_the_image_is_a_setting_with_a_good_value() -> None:
    settings = build_settings(pairs(SERVICE_DOCKERFILE, "ENV"))
    assert (settings.host, settings.port) == ("0.0.0.0", int(instructions(SERVICE_DOCKERFILE, "EXPOSE")[0]))


def test_weights_of_the_hub_lie_where_a_volume_can_be_the_users_own() -> None:
    home = pairs(SERVICE_DOCKERFILE, "ENV")["HF_HOME"]
    assert f"install --directory --owner 10001 --group 10001 {home}" in SERVICE_DOCKERFILE.read_text()


def test_the_labels_tell_version_and_licence(dockerfile: Path) -> None:
    labels = pairs(dockerfile, "LABEL")
    assert labels["org.opencontainers.image.version"] == read_version()
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_only_the_list_of_dependencies_stands_before_their_installation(dockerfile: Path) -> None:
    every = read_dockerfile(dockerfile)
    build = next(
        index for index, each in enumerate(every) if each[0] == "FROM" and each[1].endswith(" AS build")
    )
    install = next(index for index, each in enumerate(every) if "--requirement" in each[1])
    copied = [rest for name, rest in every[build:install] if name == "COPY"]
    assert copied == ["--from=requirements /requirements.txt ./", "constraints.txt ./"]


def test_all_that_the_images_copy_is_sent_to_the_engine() -> None:
    allowed = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), flags=re.MULTILINE))
    copied = {
        source
        for path in DOCKERFILES
        for rest in instructions(path, "COPY")
        if not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert copied == allowed
