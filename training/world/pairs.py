"""Image-text pairs of scenes for stage 1 and its retrieval fine-tuning."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.data.batches import PairBatch
from training.data.features import ImageFeatures
from training.world.captions import listing_caption, sample_caption
from training.world.scenes import Scene
from training.world.truth import is_true_caption, named_pairs

TextSampler = Callable[[Scene, np.random.Generator], str]
Tokenize = Callable[[Sequence[str]], tuple[Tensor, Tensor]]  # input_ids and attention_mask, [B, T] each


@dataclass(frozen=True, slots=True)
class ScenePairSampler:
    """Sampler of stage-1 batches: distinct scenes, each with its features and one text."""

    scenes: Sequence[Scene]
    features: ImageFeatures
    batch_size: int
    sample_text: TextSampler
    tokenize: Tokenize

    def __call__(self, _: int, rng: np.random.Generator) -> PairBatch:
        indices = rng.choice(len(self.scenes), size=self.batch_size, replace=False)
        scenes = [self.scenes[int(i)] for i in indices]
        texts = [self.sample_text(scene, rng) for scene in scenes]
        input_ids, attention_mask = self.tokenize(texts)
        return PairBatch(self.features.load(indices), input_ids, attention_mask, true_matches(scenes, texts))


def true_matches(scenes: Sequence[Scene], captions: Sequence[str]) -> Tensor:
    """Return [B, B], true at (i, j) if caption j is true of scene i: scenes can share a short caption."""
    caption_pairs = [set(named_pairs(caption)) for caption in captions]
    scene_pairs = [{(item.color, item.shape) for item in scene.objects} for scene in scenes]
    return torch.tensor(
        [
            [
                named <= contained and is_true_caption(caption, scene)  # the set test first: it is cheaper
                for named, caption in zip(caption_pairs, captions, strict=True)
            ]
            for contained, scene in zip(scene_pairs, scenes, strict=True)
        ]
    )


def sample_retrieval_text(scene: Scene, rng: np.random.Generator) -> str:
    """Sample a text of retrieval fine-tuning: a full listing with probability 0.5, else a caption."""
    return listing_caption(scene) if rng.random() < 0.5 else sample_caption(scene, rng)
