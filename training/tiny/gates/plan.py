"""The validation scenes and questions of a gate, equal for every run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.preprocess import ImagePreprocessor
from training.world.questions import Question, sample_questions
from training.world.rendering import render_scene
from training.world.scenes import Scene, Split, iter_scenes

VALIDATION_SEED = 2  # training has seed 0, the evaluation of a server seed 1
VALIDATION_SPLITS: tuple[Split, ...] = ("unseen", "held-out")
NUM_SCENES = 500
NUM_PROBE_SCENES = 2000
QUESTIONS_PER_SCENE = 5
NUM_EXAMPLES = 6  # saved of each split, for inspection
NUM_MISTAKES = 12  # saved of both splits together


@dataclass(frozen=True, slots=True)
class GatePlan:
    """The results under `out`, measured on `num_scenes` scenes of each split, sampled with `seed`.

    num_probe_scenes: training scenes, sampled with `probe_seed`, that linear probes are fitted on.
    num_query_tokens: words of a dense description; None: as configured in the run.
    """

    out: Path
    seed: int = VALIDATION_SEED
    num_scenes: int = NUM_SCENES
    probe_seed: int = 0
    num_probe_scenes: int = NUM_PROBE_SCENES
    num_query_tokens: int | None = None
    device: str = "cpu"

    def result(self, phase: str) -> Path:
        """Return the directory of a phase's result."""
        return self.out / "model" / phase

    def scenes(self, split: Split) -> list[Scene]:
        """Sample the validation scenes of a split."""
        return list(iter_scenes(self.seed, split, self.num_scenes))

    def questions(self, scenes: Sequence[Scene]) -> list[list[Question]]:
        """Sample the questions about each scene, equal for equal seeds."""
        return [
            sample_questions(scene, np.random.default_rng([self.seed, index]), QUESTIONS_PER_SCENE)
            for index, scene in enumerate(scenes)
        ]


def prepare_pixels(scenes: Sequence[Scene], preprocess: ImagePreprocessor) -> Tensor:
    """Render scenes at the model's image size into normalised [B, 3, S, S]."""
    return torch.stack([preprocess(render_scene(scene, preprocess.image_size)) for scene in scenes])
