"""The whole recipe in miniature: all phases, and checkpoints that the model package loads."""

import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from model import Blip2, GenerationParams
from tests.training.miniature import miniature_config
from training.tiny.recipe import TinyRecipe
from training.world.rendering import render_scene
from training.world.scenes import sample_scene

STEPS = 100


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TinyRecipe:
    recipe = TinyRecipe(miniature_config(STEPS), tmp_path_factory.mktemp("tiny"), torch.device("cpu"))
    recipe.run()
    return recipe


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(directory)}:{name}": value
        for path in sorted(directory.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def first_and_last_loss(directory: Path) -> tuple[float, float]:
    rows = [yaml.safe_load(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return rows[0]["loss"], rows[-1]["loss"]


@pytest.mark.parametrize("phase", ["stage2", "stage2_t5"])
def test_the_result_is_a_checkpoint_that_captions_and_matches(trained: TinyRecipe, phase: str) -> None:
    blip2 = Blip2.from_pretrained(str(trained.out / "model" / phase))
    pixel_values = blip2.preprocess(render_scene(sample_scene(1, "unseen", 0), 48))[None]
    with torch.inference_mode():
        image_features = blip2.encode_images(pixel_values)
        language_model_inputs = blip2.project_queries(blip2.encode_queries(image_features))
        generations = blip2.generate(language_model_inputs, [""], GenerationParams(max_new_tokens=3))
        assert blip2.matcher is not None
        logits = blip2.matcher.match_logits(image_features, *blip2.matcher.tokenize(["a red circle"]))
    assert 1 <= generations[0][0].num_tokens <= 3
    assert logits.shape == (1, 2)


@pytest.mark.parametrize("phase", TinyRecipe.PHASES)
def test_the_loss_of_every_phase_falls(trained: TinyRecipe, phase: str) -> None:
    first, last = first_and_last_loss(trained.out / phase)
    assert last < first


@pytest.mark.slow
def test_a_process_killed_in_stage_1_and_started_again_ends_with_the_same_weights(
    trained: TinyRecipe, tmp_path: Path
) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(asdict(miniature_config(STEPS))))
    command = [
        sys.executable,
        "-m",
        "training",
        "tiny",
        "--config",
        str(config),
        "--out",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen([*command, "--device", "cpu"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "stage1" / "checkpoint.pt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline, "stage 1 wrote no checkpoint within 120 s"
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (tmp_path / "run" / "model" / "stage1").exists(), "killed too late to prove anything"
    subprocess.run([*command, "--device", "cpu"], check=True, stderr=subprocess.DEVNULL)
    resumed, unbroken = weights(tmp_path / "run" / "model"), weights(trained.out / "model")
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


def test_a_phase_that_is_done_is_not_run_again(trained: TinyRecipe) -> None:
    before = {path: path.stat().st_mtime_ns for path in (trained.out / "model").rglob("*.safetensors")}
    trained.run()
    assert {path: path.stat().st_mtime_ns for path in before} == before
