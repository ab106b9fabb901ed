"""Patch labels from the generator: the attributes and the centre of the object that each patch lies on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.world.captions import GRID
from training.world.scenes import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZES,
    TEXTURES,
    UNNAMED,
    Scene,
    SceneObject,
)

UNLABELED = -100  # ignored by cross-entropy
_MARGIN = 0.25  # an object's box is enlarged by this fraction of a patch on each side

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "texture": TEXTURES,
}
PATCH_CLASSES = {name: len(values) for name, values in ATTRIBUTES.items()} | {"x": GRID, "y": GRID}


@dataclass(frozen=True, slots=True)
class PatchLabels:
    """Labels of B images and their patches.

    `patches` [B, P-1, 6] int64 holds the class of each of `PATCH_CLASSES`; -100 on the background, and for an
    unnamed colour. `images` [B, 2] holds the background and the number of objects minus one.
    """

    patches: Tensor
    images: Tensor

    @property
    def on_object(self) -> Tensor:
        """Return the mask [B, P-1] of patches that lie on an object."""
        return self.patches[..., -1] != UNLABELED

    def to(self, device: torch.device) -> "PatchLabels":
        return PatchLabels(self.patches.to(device), self.images.to(device))


def label_patches(scenes: Sequence[Scene], grid_side: int) -> PatchLabels:
    """Label the patches of scenes in row-major order, each with the object whose box contains its centre."""
    patches = torch.full((len(scenes), grid_side, grid_side, len(PATCH_CLASSES)), UNLABELED)
    centers = (np.arange(grid_side) + 0.5) / grid_side
    for row, scene in enumerate(scenes):
        for item in scene.objects:
            half_width = item.radius + _MARGIN / grid_side
            box = np.ix_(np.abs(centers - item.y) < half_width, np.abs(centers - item.x) < half_width)
            patches[row][box] = torch.tensor(_object_classes(item))
    backgrounds = tuple(BACKGROUNDS)
    images = [(backgrounds.index(scene.background), len(scene.objects) - 1) for scene in scenes]
    return PatchLabels(patches.flatten(1, 2), torch.tensor(images))


def mirror(labels: PatchLabels) -> PatchLabels:
    """Return the labels of the horizontally mirrored images."""
    side = int(labels.patches.shape[1] ** 0.5)
    patches = labels.patches.view(-1, side, side, len(PATCH_CLASSES)).flip(2).flatten(1, 2)
    x = list(PATCH_CLASSES).index("x")
    on_object = patches[..., x] != UNLABELED
    patches[..., x] = torch.where(on_object, GRID - 1 - patches[..., x], UNLABELED)
    return PatchLabels(patches, labels.images)


def concatenate(batches: Sequence[PatchLabels]) -> PatchLabels:
    """Concatenate the labels of several batches."""
    return PatchLabels(torch.cat([b.patches for b in batches]), torch.cat([b.images for b in batches]))


def _object_classes(item: SceneObject) -> list[int]:
    attributes = [
        UNLABELED if getattr(item, name) == UNNAMED else values.index(getattr(item, name))
        for name, values in ATTRIBUTES.items()
    ]
    return [*attributes, min(int(item.x * GRID), GRID - 1), min(int(item.y * GRID), GRID - 1)]
