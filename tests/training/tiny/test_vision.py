from pathlib import Path

import torch

from tests.training.miniature import miniature_config
from training.loop import Run
from training.tiny.patch_labels import label_patches
from training.tiny.vision import (
    LabeledScenes,
    PatchProbe,
    pretrain_vision_encoder,
)
from training.world.pixels import cache_images
from training.world.scenes import Scene, SceneObject, iter_scenes

STAR = SceneObject("star", "green", "large", "striped", x=0.26, y=0.74, radius=0.18)
SCENE = Scene((STAR,), "black", noise_seed=0)


def test_a_colour_without_a_name_is_left_out_but_its_object_is_not() -> None:
    (scene,) = iter_scenes(0, "recolored", 1)
    labels = label_patches([scene], grid_side=8)
    of_objects = labels.patches[labels.on_object]
    assert len(of_objects)
    assert (of_objects[:, 0] == -100).all()
    assert (of_objects[:, 1:] >= 0).all()
    probe = PatchProbe(32, grid_side=8)
    losses = probe.losses(torch.randn(2, 65, 32), label_patches([scene, SCENE], grid_side=8))
    assert torch.isfinite(losses["color"])


def test_the_probe_learns_to_read_features_that_hold_the_labels() -> None:
    torch.manual_seed(0)
    labels = label_patches([SCENE], grid_side=8)
    features = torch.randn(1, 65, 32)
    probe = PatchProbe(32, grid_side=8)
    optimizer = torch.optim.Adam(probe.parameters(), lr=0.02)
    first = probe.losses(features, labels)["loss"].item()
    for _ in range(40):
        optimizer.zero_grad()
        loss = probe.losses(features, labels)["loss"]
        torch.autograd.backward(loss)
        optimizer.step()
    assert loss.item() < 0.3 * first
    assert probe.accuracies(features, labels)["color"] == 1.0


def test_named_and_recoloured_scenes_train_the_encoder(tmp_path: Path) -> None:
    config = miniature_config(steps=160)
    named, recolored = (
        LabeledScenes(scenes, cache_images(scenes, 48, tmp_path / f"{split}.npy"))
        for split in ("train", "recolored")
        for scenes in [list(iter_scenes(0, split, 8))]
    )
    run = Run("vision", tmp_path / "run", 0, torch.device("cpu"), autocast_dtype=None, save_every=50)
    encoder = pretrain_vision_encoder(run, config, named, recolored)
    assert encoder(named.images.pixel_values([0])).shape == (1, 17, 16)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first, last = (float(row.split('"loss": ')[1].split(",")[0]) for row in (rows[0], rows[-1]))
    assert last < first
