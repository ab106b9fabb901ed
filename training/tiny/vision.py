"""Supervised pre-training of the small image encoder on the generator's labels, by linear probes.

The labels take the place of the large image corpus of a real encoder. The probes classify the features that
the Q-Former will attend to: from each patch its object's colour, shape, size, texture and centre, from the
class token background and count. What a linear probe can extract, cross-attention can. The probes are
discarded.

Half of the images are mirrored. A third are recoloured scenes with objects in unnamed colours, so that shapes
are learned for every colour and not only for the pairs of the training scenes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2VisionConfig

from model.vision import VisionEncoder, build_vision_encoder
from training.loop import Losses, Run, train
from training.tiny.config import TinyConfig
from training.tiny.patch_labels import (
    PATCH_CLASSES,
    UNLABELED,
    PatchLabels,
    concatenate,
    label_patches,
    mirror,
)
from training.world.pixels import SceneImages
from training.world.scenes import BACKGROUNDS, MAX_OBJECTS, Scene

_LOSS_WEIGHTS = {"shape": 2.0}  # learned last; the default is 1


@dataclass(frozen=True, slots=True)
class LabeledScenes:
    """Scenes with their pixels, in the same order."""

    scenes: Sequence[Scene]
    images: SceneImages


class PatchProbe(nn.Module):
    """Linear probes of image features [B, P, V]."""

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
        """Compute the mean cross-entropy of every probe, and their weighted sum as `loss`."""
        features = self.norm(image_features)
        image, patches = features[:, 0], features[:, 1:]  # [B, V], [B, P-1, V]
        on_object = labels.on_object  # [B, P-1]
        object_patches, classes = patches[on_object], labels.patches[on_object]
        losses = {
            name: F.cross_entropy(head(object_patches).float(), classes[:, k])
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
        """Compute the accuracy of every probe over object patches; over images for background and count."""
        features = self.norm(image_features)
        image, patches = features[:, 0], features[:, 1:]
        on_object = labels.on_object
        object_patches, classes = patches[on_object], labels.patches[on_object]
        hits = {
            name: (head(object_patches).argmax(-1) == classes[:, k])[classes[:, k] != UNLABELED]
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


def build_encoder(config: TinyConfig) -> VisionEncoder:
    """Build an untrained encoder of the configured size; eager attention is faster for training on a CPU."""
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
    """Train the image encoder on labelled scenes; resumes from its last checkpoint."""
    torch.manual_seed(config.seed)
    side = config.world.image_size // config.vision_model.patch_size
    encoder = build_encoder(config).to(run.device)
    probe = PatchProbe(encoder.hidden_size, side).to(run.device)
    batch_size = config.vision_pretraining.batch_size
    num_recolored = batch_size // 3

    def step(_: int, rng: np.random.Generator) -> Losses:
        batches = [
            _sample_batch(named, rng, batch_size - num_recolored, side),
            _sample_batch(recolored, rng, num_recolored, side),
        ]
        pixels = torch.cat([pixels for pixels, _ in batches])
        labels = concatenate([labels for _, labels in batches])
        return probe.losses(encoder(pixels.to(run.device)), labels.to(run.device))

    train(run, nn.ModuleDict({"encoder": encoder, "probe": probe}), step, config.vision_pretraining)
    return encoder.eval()


def _sample_batch(
    source: LabeledScenes, rng: np.random.Generator, count: int, side: int
) -> tuple[Tensor, PatchLabels]:
    """Sample `count` images [count, 3, S, S] with their labels; the first half is mirrored."""
    indices = rng.integers(len(source.scenes), size=count)
    pixels = source.images.pixel_values(indices)
    labels = label_patches([source.scenes[int(i)] for i in indices], side)
    half = count // 2
    mirrored = mirror(PatchLabels(labels.patches[:half], labels.images[:half]))
    unchanged = PatchLabels(labels.patches[half:], labels.images[half:])
    return torch.cat([pixels[:half].flip(-1), pixels[half:]]), concatenate([mirrored, unchanged])
