"""Unimodal pre-training of the small image encoder: every patch learns what it lies on, and where.

Supervised by the generator's own labels, which stand in for the large image corpus a real encoder has seen.
Linear heads on the features that the Q-Former will read ask each patch for the colour, shape, size and
texture of its object and for the place of the object's centre, and the class token for background and count:
what a linear head can read, cross-attention can. The heads are thrown away.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2VisionConfig

from model.vision import VisionEncoder, build_vision_encoder
from training.config import TinyConfig
from training.loop import Losses, Run, train
from training.pixels import SceneImages
from training.scene_text import GRID
from training.scenes import BACKGROUNDS, COLORS, MAX_OBJECTS, SHAPES, SIZES, TEXTURES, Scene, SceneObject

_MARGIN = 0.25  # a patch belongs to an object up to this part of a patch beyond the object's box
_NO_OBJECT = -100

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "texture": TEXTURES,
}
PATCH_CLASSES = {name: len(values) for name, values in ATTRIBUTES.items()} | {"x": GRID, "y": GRID}


@dataclass(frozen=True, slots=True)
class PatchLabels:
    """What the patches of B images lie on.

    `patches` [B, P-1, 6] int64 holds the class of each of `PATCH_CLASSES` (-100 on the background);
    `images` [B, 2] the background and the number of objects less one.
    """

    patches: Tensor
    images: Tensor


class PatchProbe(nn.Module):
    """Linear read-outs of image features [B, P, V]."""

    rows: Tensor
    columns: Tensor

    def __init__(self, hidden_size: int, grid_side: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.patch_heads = nn.ModuleDict(
            {name: nn.Linear(hidden_size, n) for name, n in PATCH_CLASSES.items()}
        )
        self.is_object = nn.Linear(hidden_size, 1)
        self.place = nn.Linear(hidden_size, 2 * grid_side)
        self.background = nn.Linear(hidden_size, len(BACKGROUNDS))
        self.count = nn.Linear(hidden_size, MAX_OBJECTS)
        cells = torch.arange(grid_side)
        self.register_buffer("rows", cells.repeat_interleave(grid_side), persistent=False)
        self.register_buffer("columns", cells.repeat(grid_side), persistent=False)

    def losses(self, image_features: Tensor, labels: PatchLabels) -> Losses:
        """Mean cross-entropy of every read-out, and their sum as `loss`."""
        features = self.norm(image_features)
        image, patches = features[:, 0], features[:, 1:]  # [B, V], [B, P-1, V]
        on_object = labels.patches[..., 0] != _NO_OBJECT  # [B, P-1]
        found, wanted = patches[on_object], labels.patches[on_object]
        losses = {
            name: F.cross_entropy(head(found).float(), wanted[:, k])
            for k, (name, head) in enumerate(self.patch_heads.items())
        }
        is_object = self.is_object(patches).squeeze(-1).float()
        losses["object"] = F.binary_cross_entropy_with_logits(is_object, on_object.float())
        losses["place"] = self._place_loss(patches)
        losses["background"] = F.cross_entropy(self.background(image).float(), labels.images[:, 0])
        losses["count"] = F.cross_entropy(self.count(image).float(), labels.images[:, 1])
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    @torch.no_grad()
    def accuracies(self, image_features: Tensor, labels: PatchLabels) -> dict[str, float]:
        """Share of object patches, for background and count of images, that are read right."""
        features = self.norm(image_features)
        image, patches = features[:, 0], features[:, 1:]
        on_object = labels.patches[..., 0] != _NO_OBJECT
        found, wanted = patches[on_object], labels.patches[on_object]
        hits = {
            name: head(found).argmax(-1) == wanted[:, k]
            for k, (name, head) in enumerate(self.patch_heads.items())
        }
        hits["background"] = self.background(image).argmax(-1) == labels.images[:, 0]
        hits["count"] = self.count(image).argmax(-1) == labels.images[:, 1]
        return {name: float(hit.float().mean()) for name, hit in hits.items()}

    def _place_loss(self, patches: Tensor) -> Tensor:
        logits = self.place(patches).float().unflatten(-1, (2, -1))  # [B, P-1, 2, side]
        batch = len(patches)
        rows, columns = self.rows.expand(batch, -1), self.columns.expand(batch, -1)
        return F.cross_entropy(logits[:, :, 0].flatten(0, 1), rows.flatten()) + F.cross_entropy(
            logits[:, :, 1].flatten(0, 1), columns.flatten()
        )


def label_patches(scenes: Sequence[Scene], grid_side: int) -> PatchLabels:
    """Labels the patches of scenes in reading order, each with the object whose box it lies in."""
    patches = torch.full((len(scenes), grid_side, grid_side, len(PATCH_CLASSES)), _NO_OBJECT)
    centers = (np.arange(grid_side) + 0.5) / grid_side
    for row, scene in enumerate(scenes):
        for item in scene.objects:
            reach = item.radius + _MARGIN / grid_side
            near = np.ix_(np.abs(centers - item.y) < reach, np.abs(centers - item.x) < reach)
            patches[row][near] = torch.tensor(_object_classes(item))
    backgrounds = tuple(BACKGROUNDS)
    images = [(backgrounds.index(scene.background), len(scene.objects) - 1) for scene in scenes]
    return PatchLabels(patches.flatten(1, 2), torch.tensor(images))


def _object_classes(item: SceneObject) -> list[int]:
    attributes = [values.index(getattr(item, name)) for name, values in ATTRIBUTES.items()]
    return [*attributes, min(int(item.x * GRID), GRID - 1), min(int(item.y * GRID), GRID - 1)]


def build_vision_tower(config: TinyConfig) -> VisionEncoder:
    """An untrained encoder of the configured size; eager attention, the faster one for training on a CPU."""
    shape = config.vision_model
    return build_vision_encoder(
        Blip2VisionConfig(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads,
            image_size=config.world.image_size,
            patch_size=shape.patch_size,
            initializer_range=0.02,
        ),
        attn_implementation="eager",
    )


def pretrain_vision_encoder(
    run: Run, config: TinyConfig, scenes: Sequence[Scene], images: SceneImages
) -> VisionEncoder:
    """Trains the image encoder on labelled scenes; resumes where a former run stopped."""
    torch.manual_seed(config.seed)
    side = config.world.image_size // config.vision_model.patch_size
    encoder = build_vision_tower(config).to(run.device)
    probe = PatchProbe(encoder.hidden_size, side).to(run.device)

    def step(rng: np.random.Generator) -> Losses:
        chosen = rng.integers(len(scenes), size=config.vision_pretraining.batch_size)
        labels = label_patches([scenes[int(i)] for i in chosen], side)
        labels = PatchLabels(labels.patches.to(run.device), labels.images.to(run.device))
        return probe.losses(encoder(images.pixel_values(chosen).to(run.device)), labels)

    train(run, nn.ModuleDict({"encoder": encoder, "probe": probe}), step, config.vision_pretraining)
    return encoder.eval()
