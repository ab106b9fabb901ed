"""The whole recipe from nothing, very small: all phases, and a checkpoint the model package loads."""

import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from model import Blip2, GenerationParams
from training.config import (
    CONFIG_DIR,
    LanguageShape,
    Optimization,
    Retrieval,
    TinyConfig,
    VisionShape,
    World,
    load_tiny_config,
)
from training.features import ImageFeatures
from training.loop import Run
from training.scenes import iter_scenes, render_scene, sample_scene
from training.stage1 import build_matcher
from training.stage2 import hash_weights, train_stage2
from training.tiny import TinyTraining

FEW = Optimization(
    steps=100,
    batch_size=4,
    learning_rate=5e-3,
    min_learning_rate=1e-4,
    warmup_steps=5,
    weight_decay=0.05,
    beta2=0.98,
    max_grad_norm=1.0,
)


def small_config() -> TinyConfig:
    shipped = load_tiny_config(CONFIG_DIR / "tiny.yaml")
    return replace(
        shipped,
        autocast="float32",
        save_every=20,
        texts_per_image=3,
        world=World(seed=0, num_train_scenes=16, image_size=48),
        vision_model=VisionShape(16, 1, 2, 32, patch_size=12),
        language_model=LanguageShape(16, 1, 2, 32, max_position_embeddings=128),
        qformer=replace(
            shipped.qformer, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        ),
        vision_pretraining=FEW,
        language_pretraining=FEW,
        stage1=FEW,
        retrieval=Retrieval(num_pairs=2, optimization=replace(FEW, batch_size=8)),
        stage2=FEW,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TinyTraining:
    training = TinyTraining(small_config(), tmp_path_factory.mktemp("tiny"), torch.device("cpu"))
    training.run()
    return training


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(directory)}:{name}": value
        for path in sorted(directory.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def first_and_last_loss(directory: Path) -> tuple[float, float]:
    rows = [yaml.safe_load(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return rows[0]["loss"], rows[-1]["loss"]


def test_the_result_is_a_checkpoint_that_captions_and_matches(trained: TinyTraining) -> None:
    blip2 = Blip2.from_pretrained(str(trained.out / "model" / "stage2"))
    pixel_values = blip2.preprocess(render_scene(sample_scene(1, "unseen", 0), 48))[None]
    with torch.inference_mode():
        image_features = blip2.encode_images(pixel_values)
        language_model_inputs = blip2.project_queries(blip2.encode_queries(image_features))
        generations = blip2.generate(language_model_inputs, [""], GenerationParams(max_new_tokens=3))
        assert blip2.matcher is not None
        logits = blip2.matcher.match_logits(image_features, *blip2.matcher.tokenize(["a red circle"]))
    assert 1 <= generations[0][0].num_tokens <= 3
    assert logits.shape == (1, 2)


@pytest.mark.parametrize("phase", TinyTraining.PHASES)
def test_the_loss_of_every_phase_falls(trained: TinyTraining, phase: str) -> None:
    first, last = first_and_last_loss(trained.out / phase)
    assert last < first


@pytest.mark.slow
def test_a_process_killed_in_stage_1_and_started_again_ends_with_the_same_weights(
    trained: TinyTraining, tmp_path: Path
) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(asdict(small_config())))
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


def test_stage_2_trains_the_query_branch_and_leaves_the_language_model_bit_equal(
    trained: TinyTraining, tmp_path: Path
) -> None:
    config = small_config()
    blip2 = Blip2.from_pretrained(str(trained.out / "model" / "stage2"))
    language_model = blip2.language_model
    assert language_model is not None
    frozen = hash_weights(language_model)
    matcher = build_matcher(config)
    scenes = list(iter_scenes(0, "train", 16))
    features = ImageFeatures(torch.randn(16, 17, 16).half().numpy())
    run = Run("stage2", tmp_path, seed=0, device=torch.device("cpu"), autocast_dtype=None, save_every=100)
    branch = train_stage2(run, config, scenes, features, matcher, language_model)
    assert hash_weights(language_model) == frozen
    moved = dict(branch.named_parameters())
    assert not torch.equal(moved["query_tokens"], matcher.query_tokens)
    assert not torch.equal(moved["ln_vision.weight"], matcher.ln_vision.weight)


def test_a_phase_that_is_done_is_not_run_again(trained: TinyTraining) -> None:
    before = {path: path.stat().st_mtime_ns for path in (trained.out / "model").rglob("*.safetensors")}
    trained.run()
    assert {path: path.stat().st_mtime_ns for path in before} == before
