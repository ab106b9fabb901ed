"""The datasets of the recipe: scenes of the training splits, their cached images and image features."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate import PartialState

from model.vision import VisionEncoder
from training.data.features import ImageFeatures, cache_features
from training.provenance import hash_module
from training.tiny.config import WorldConfig
from training.tiny.vision import LabeledScenes
from training.world.pixels import SceneImages, cache_images
from training.world.scenes import Scene, Split, iter_scenes


@dataclass(frozen=True)
class Datasets:
    """Datasets of one run, sampled and cached on first use; images and features are stored under `out`."""

    config: WorldConfig
    out: Path

    @cached_property
    def scenes(self) -> list[Scene]:
        """The scenes of the split `train`."""
        return self._sample("train", self.config.num_train_scenes)

    @cached_property
    def language_scenes(self) -> list[Scene]:
        """The scenes of language pre-training: the split `train` and the text-only scenes."""
        return [*self.scenes, *self._sample("text-only", self.config.num_told_scenes)]

    @cached_property
    def images(self) -> SceneImages:
        """The images of `scenes`."""
        return self._cache_images("train", self.scenes)

    def labeled_scenes(self) -> LabeledScenes:
        """Return the scenes of the split `train` with their images."""
        return LabeledScenes(self.scenes, self.images)

    def recolored_scenes(self) -> LabeledScenes:
        """Return the scenes of the split `recolored` with their images."""
        scenes = self._sample("recolored", self.config.num_recolored_scenes)
        return LabeledScenes(scenes, self._cache_images("recolored", scenes))

    def features(self, encoder: VisionEncoder, device: torch.device) -> ImageFeatures:
        """Encode the images of `scenes` with a frozen encoder, or open the cached features."""
        path = self.out / f"features-{hash_module(encoder)[:16]}-{len(self.images)}.npy"
        with PartialState().main_process_first():
            return cache_features(encoder, self.images, path, device)

    def _sample(self, split: Split, count: int) -> list[Scene]:
        return list(iter_scenes(self.config.seed, split, count))

    def _cache_images(self, split: Split, scenes: Sequence[Scene]) -> SceneImages:
        size = self.config.image_size
        name = f"scenes-{split}-{self.config.seed}-{len(scenes)}-{size}.npy"
        with PartialState().main_process_first():
            return cache_images(scenes, size, self.out / name)
