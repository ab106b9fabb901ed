"""The gate of the image encoder on features of known content."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.training.tiny.gates.fakes import PLAN
from training.tiny.gates.vision import measure_encoder, pool_objects
from training.tiny.patch_labels import PATCH_CLASSES, label_patches
from training.world.scenes import Scene, SceneObject

GRID_SIDE = 8


def encode_truly(scenes: Sequence[Scene]) -> Tensor:
    """Encode the label of each patch one-hot, behind a class token, into [B, 65, 43]."""
    labels = label_patches(scenes, GRID_SIDE).patches  # [B, 64, 6]
    spelt = [
        torch.nn.functional.one_hot(labels[..., k].clamp(min=0), count)
        for k, count in enumerate(PATCH_CLASSES.values())
    ]
    patches = torch.cat(spelt, dim=-1).float()
    return torch.cat([torch.zeros(len(scenes), 1, patches.shape[-1]), patches], dim=1)


def encode_noise(scenes: Sequence[Scene]) -> Tensor:
    return torch.randn(len(scenes), 65, 43, generator=torch.Generator().manual_seed(len(scenes)))


def test_features_that_spell_everything_out_meet_every_bar_of_the_image_encoder() -> None:
    measured = measure_encoder(encode_truly, PLAN)
    assert set(measured.figures["unseen"].values()) == {1.0}
    assert set(measured.figures["held-out, the held-out object alone"].values()) == {1.0}
    assert {"unseen, 1_objects", "unseen, small", "held-out, 4_objects"} <= measured.figures.keys()
    assert len(measured.bars) == 5
    assert all(bar.met for bar in measured.bars)


def test_features_that_say_nothing_miss_the_bars_of_the_image_encoder() -> None:
    measured = measure_encoder(encode_noise, PLAN)
    assert not any(bar.met for bar in measured.bars if "size" not in bar.name)


def test_an_object_is_pooled_from_its_own_patches_alone() -> None:
    left = SceneObject("circle", "red", "small", "solid", 0.25, 0.25, 0.1)
    right = SceneObject("star", "blue", "large", "striped", 0.7, 0.7, 0.18)
    pooled = pool_objects(encode_truly, [Scene((left, right), "gray", 0)])
    spelt = torch.nn.functional.layer_norm(encode_truly([Scene((left,), "gray", 0)]), (43,))[0, 1 + 8 + 1]
    assert pooled.num_objects == [2, 2]
    assert pooled.classes[0].tolist() == [0, 0, 0, 0, 3, 3]  # red, circle, small, solid, cell 3 of 12 twice
    assert torch.allclose(pooled.features[0], spelt, atol=1e-5)
