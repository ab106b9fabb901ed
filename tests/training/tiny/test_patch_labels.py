from dataclasses import replace

import torch

from training.tiny.patch_labels import PATCH_CLASSES, label_patches, mirror
from training.world.scenes import SHAPES, Scene, SceneObject, iter_scenes

STAR = SceneObject("star", "green", "large", "striped", x=0.26, y=0.74, radius=0.18)
SCENE = Scene((STAR,), "black", noise_seed=0)


def test_patches_within_an_object_carry_its_labels_and_the_others_none() -> None:
    labels = label_patches([SCENE], grid_side=8)
    grid = labels.patches.view(8, 8, len(PATCH_CLASSES))
    # the box spans 0.08 … 0.44 across and 0.56 … 0.92 down: the patches centred inside it
    rows, columns = torch.where(labels.on_object.view(8, 8))
    assert set(rows.tolist()) == {4, 5, 6, 7}
    assert set(columns.tolist()) == {0, 1, 2, 3}
    assert grid[6, 2].tolist() == [3, SHAPES.index("star"), 1, 1, 3, 8]
    assert labels.images.tolist() == [[2, 0]]


def test_mirrored_labels_are_those_of_the_mirrored_scene() -> None:
    scenes = [SCENE, *iter_scenes(0, "train", 20)]
    labels = label_patches(scenes, grid_side=8)
    flipped = label_patches([_mirrored(scene) for scene in scenes], grid_side=8)
    assert torch.equal(mirror(labels).patches, flipped.patches)
    assert torch.equal(mirror(mirror(labels)).patches, labels.patches)


def _mirrored(scene: Scene) -> Scene:
    objects = tuple(replace(item, x=1 - item.x) for item in scene.objects)
    return replace(scene, objects=objects)  # in the order of labelling, which decides where boxes overlap
