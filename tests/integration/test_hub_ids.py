"""Ids of the Hub: download with a progress bar, offline use, and errors that name the cure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from model import Blip2
from model.checkpoints import save_hub
from model.checkpoints.__main__ import main
from model.checkpoints.convert import convert
from tests.builders import build_components
from tests.integration.hub_server import REVISIONS, hub_server

NAME = "someone/blip2-small"
LOAD = """
import sys
from model import Blip2, ModelError
failed = False
for argument in sys.argv[1:]:
    name, _, revision = argument.partition("@")
    try:
        print(Blip2.from_pretrained(name, revision=revision or None).fingerprint)
    except ModelError as error:
        print(error, file=sys.stderr)
        failed = True
sys.exit(failed)
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for seed, branch in enumerate(("main", "v2")):
        directory = tmp_path_factory.mktemp(branch)
        save_hub(directory, build_components(seed=seed))
        (directory / "pytorch_model.bin").write_bytes(b"a pickle, never fetched")
        found[f"{NAME}@{branch}"] = directory
    return found


def load(tmp_path: Path, endpoint: str, *models: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Load models "owner/name@revision" in a new process: the Hub's client reads variables when imported."""
    return run(tmp_path, endpoint, "-c", LOAD, *(models or (NAME,)), **variables)


def fetch(tmp_path: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    return run(tmp_path, endpoint, "-m", "model.checkpoints", "fetch", NAME, "--revision", "v2")


def run(tmp_path: Path, endpoint: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = {**kept, "HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint, **variables}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_a_model_is_downloaded_once_and_then_loads_offline(
    repositories: dict[str, Path], tmp_path: Path
) -> None:
    expected = Blip2.from_pretrained(str(repositories[f"{NAME}@main"])).fingerprint
    with hub_server(repositories) as endpoint:
        first = load(tmp_path, endpoint, NAME, f"{NAME}@v2")
        other = Blip2.from_pretrained(str(repositories[f"{NAME}@v2"])).fingerprint
        assert first.stdout.split() == [expected, other], first.stderr
        assert "100%" in first.stderr  # the progress bar
    assert load(tmp_path, endpoint, HF_HUB_OFFLINE="1").stdout.strip() == expected
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.slow
def test_a_fetched_model_is_compared_with_the_hashes_of_the_hub(
    repositories: dict[str, Path], tmp_path: Path
) -> None:
    with hub_server(repositories) as endpoint:
        first = fetch(tmp_path, endpoint)
        assert f"commit {REVISIONS['v2']}" in first.stdout, first.stderr
        [weights] = tmp_path.rglob("*.safetensors")
        damaged = bytearray(weights.read_bytes())
        damaged[-1] ^= 1
        weights.write_bytes(damaged)
        second = fetch(tmp_path, endpoint)
        assert (second.returncode, second.stdout) == (2, "")
        assert f"model.safetensors of {NAME} were not what the Hub has, and are deleted" in second.stderr
        assert fetch(tmp_path, endpoint).stdout == first.stdout
    assert weights.read_bytes() == (repositories[f"{NAME}@v2"] / "model.safetensors").read_bytes()


def test_what_is_no_id_of_the_hub_cannot_be_fetched(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "tiny"]) == 2
    assert "'tiny' is no id of the Hub, 'owner/name'" in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_not_to_be_had_is_told_with_its_cure(repositories: dict[str, Path], tmp_path: Path) -> None:
    with hub_server(repositories) as endpoint:
        refused = load(tmp_path, endpoint, f"{NAME}@v3", "someone/else").stderr
        assert "has no such revision" in refused
        assert "the Hub has no such model" in refused
    offline = load(tmp_path, endpoint, HF_HUB_OFFLINE="1")
    assert offline.returncode == 1
    assert f"cannot fetch {NAME}: it was not downloaded before" in offline.stderr
    assert "Traceback" not in offline.stderr


@pytest.mark.slow
def test_a_gated_model_needs_the_token(repositories: dict[str, Path], tmp_path: Path) -> None:
    with hub_server(repositories, token="hf_secret") as endpoint:
        assert "it is gated; accept its terms on the Hub, and set HF_TOKEN" in load(tmp_path, endpoint).stderr
        assert load(tmp_path, endpoint, HF_TOKEN="hf_secret").returncode == 0


@pytest.mark.slow
def test_pickles_are_refused_and_an_adapter_brings_its_parts(tmp_path: Path) -> None:
    pickled, adapter = tmp_path / "pickled", tmp_path / "adapter"
    save_hub(pickled, build_components())
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    convert(build_components(), adapter, "adapter")
    with hub_server({"a/pickled@main": pickled, "a/adapter@main": adapter}) as endpoint:
        done = load(tmp_path / "cache", endpoint, "a/pickled", "a/adapter")
        assert "a/pickled has no safetensors; pickles (*.bin) are not read" in done.stderr
        assert done.stdout.strip() == Blip2.from_pretrained(str(adapter)).fingerprint, done.stderr
