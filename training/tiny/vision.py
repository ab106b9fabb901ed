"""Unimodal pre-training of the small image encoder: every patch learns what it lies on, and where.

Supervised by the generator's own labels, which stand in for the large image corpus a real encoder has seen.
Linear heads on the features that the Q-Former will read ask each patch for the colour, shape, size and
texture of its object and for the place of the object's centre, and the class token for background and count:
what a linear head can read, cross-attention can. The heads are thrown away.

Half of the images are mirrored, and a third of them are of recoloured scenes, whose objects are painted in
colours without a name: shape is learned of every colour, not of the pairs that the named scenes hold.
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
from training.world.captions import GRID
from training.world.pixels import SceneImages
from training.world.scenes import (
    BACKGROUNDS,
    COLORS,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    TEXTURES,
    UNNAMED,
    Scene,
    SceneObject,
)

_MARGIN = 0.25  # a patch belongs to an object up to this part of a patch beyond the object's box
_UNLABELED = -100  # which cross-entropy leaves out
_LOSS_WEIGHTS = {"shape": 2.0}  # what is learned last; 1 where nothing is said

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

    `patches` [B, P-1, 6] int64 holds the class of each of `PATCH_CLASSES`; -100 on the background, and for a
    colour without a name;
    `images` [B, 2] the background and the number of objects less one.
    """

    patches: Tensor
    images: Tensor

    @property
    def on_object(self) -> Tensor:
        """Which patches lie on an object, [B, P-1]."""
        return self.patches[..., -1] != _UNLABELED

    def to(self, device: torch.device) -> "PatchLabels":
        return PatchLabels(self.patches.to(device), self.images.to(device))


@dataclass(frozen=True, slots=True)
class LabeledScenes:
    """Scenes with their pixels, in the same order."""

    scenes: Sequence[Scene]
    images: SceneImages


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
        """Mean cross-entropy of every read-out, and their weighted sum as `loss`."""
        features = self.norm(image_features)
        image, patches = features[:, 0], features[:, 1:]  # [B, V], [B, P-1, V]
        on_object = labels.on_object  # [B, P-1]
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
        loss = torch.stack([_LOSS_WEIGHTS.get(name, 1.0) * value for name, value in losses.items()]).sum()
        return {"loss": loss, **losses}

    @torch.no_grad()
    def accuracies(self, image_features: Tensor, labels: PatchLabels) -> dict[str, float]:
        """Share of object patches, for background and count of images, that are read right."""
        features = self.norm(image_features)
        image, patches = features[:, 0], features[:, 1:]
        on_object = labels.on_object
        found, wanted = patches[on_object], labels.patches[on_object]
        hits = {
            name: (head(found).argmax(-1) == wanted[:, k])[wanted[:, k] != _UNLABELED]
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
    patches = torch.full((len(scenes), grid_side, grid_side, len(PATCH_CLASSES)), _UNLABELED)
    centers = (np.arange(grid_side) + 0.5) / grid_side
    for row, scene in enumerate(scenes):
        for item in scene.objects:
            reach = item.radius + _MARGIN / grid_side
            near = np.ix_(np.abs(centers - item.y) < reach, np.abs(centers - item.x) < reach)
            patches[row][near] = torch.tensor(_object_classes(item))
    backgrounds = tuple(BACKGROUNDS)
    images = [(backgrounds.index(scene.background), len(scene.objects) - 1) for scene in scenes]
    return PatchLabels(patches.flatten(1, 2), torch.tensor(images))


def mirror(labels: PatchLabels) -> PatchLabels:
    """The labels of the same images with left and right exchanged."""
    side = int(labels.patches.shape[1] ** 0.5)
    patches = labels.patches.view(-1, side, side, len(PATCH_CLASSES)).flip(2).flatten(1, 2)
    x = list(PATCH_CLASSES).index("x")
    on_object = patches[..., x] != _UNLABELED
    patches[..., x] = torch.where(on_object, GRID - 1 - patches[..., x], _UNLABELED)
    return PatchLabels(patches, labels.images)


def _object_classes(item: SceneObject) -> list[int]:
    attributes = [
        _UNLABELED if getattr(item, name) == UNNAMED else values.index(getattr(item, name))
        for name, values in ATTRIBUTES.items()
    ]
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
    run: Run, config: TinyConfig, named: LabeledScenes, recolored: LabeledScenes
) -> VisionEncoder:
    """Trains the image encoder on labelled scenes; resumes where a former run stopped."""
    torch.manual_seed(config.seed)
    side = config.world.image_size // config.vision_model.patch_size
    encoder = build_vision_tower(config).to(run.device)
    probe = PatchProbe(encoder.hidden_size, side).to(run.device)
    batch_size = config.vision_pretraining.batch_size
    num_recolored = batch_size // 3

    def step(rng: np.random.Generator) -> Losses:
        batches = [
            _draw_batch(named, rng, batch_size - num_recolored, side),
            _draw_batch(recolored, rng, num_recolored, side),
        ]
        pixels = torch.cat([pixels for pixels, _ in batches])
        labels = _concatenate([labels for _, labels in batches])
        return probe.losses(encoder(pixels.to(run.device)), labels.to(run.device))

    train(run, nn.ModuleDict({"encoder": encoder, "probe": probe}), step, config.vision_pretraining)
    return encoder.eval()


def _draw_batch(
    source: LabeledScenes, rng: np.random.Generator, count: int, side: int
) -> tuple[Tensor, PatchLabels]:
    """`count` random images [count, 3, S, S], the first half of them mirrored, with their labels."""
    chosen = rng.integers(len(source.scenes), size=count)
    pixels = source.images.pixel_values(chosen)
    labels = label_patches([source.scenes[int(i)] for i in chosen], side)
    half = count // 2
    mirrored = mirror(PatchLabels(labels.patches[:half], labels.images[:half]))
    kept = PatchLabels(labels.patches[half:], labels.images[half:])
    return torch.cat([pixels[:half].flip(-1), pixels[half:]]), _concatenate([mirrored, kept])


def _concatenate(parts: Sequence[PatchLabels]) -> PatchLabels:
    return PatchLabels(torch.cat([p.patches for p in parts]), torch.cat([p.images for p in parts]))
