"""What a gate measures, and the scenes it measures on: the same for every run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.preprocess import ImagePreprocessor
from training.world.questions import Question, sample_questions
from training.world.scenes import Scene, Split, iter_scenes, render_scene

VALIDATION_SEED = 2  # training draws with 0, the evaluation of a server with 1
VALIDATION_SPLITS: tuple[Split, ...] = ("unseen", "held-out")
NUM_SCENES = 500
NUM_PROBE_SCENES = 2000
QUESTIONS_PER_SCENE = 5
NUM_EXAMPLES = 6  # kept of each split to be looked at
NUM_MISTAKES = 12  # kept of both splits together


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: the results under `out`, on `num_scenes` scenes of each split drawn with `seed`.

    num_probe_scenes: training scenes, drawn with `probe_seed`, that linear probes are fitted on.
    num_query_tokens: how many words a dense description has; None: as the run was configured.
    """

    out: Path
    seed: int = VALIDATION_SEED
    num_scenes: int = NUM_SCENES
    probe_seed: int = 0
    num_probe_scenes: int = NUM_PROBE_SCENES
    num_query_tokens: int | None = None
    device: str = "cpu"

    def result(self, phase: str) -> Path:
        """The directory of a phase's finished weights."""
        return self.out / "model" / phase

    def scenes(self, split: Split) -> list[Scene]:
        return list(iter_scenes(self.seed, split, self.num_scenes))

    def questions(self, scenes: Sequence[Scene]) -> list[list[Question]]:
        """What each scene is asked; the same for the same seed, always."""
        return [
            sample_questions(scene, np.random.default_rng([self.seed, index]), QUESTIONS_PER_SCENE)
            for index, scene in enumerate(scenes)
        ]


def prepare_pixels(scenes: Sequence[Scene], preprocess: ImagePreprocessor) -> Tensor:
    """Draws scenes at the size a model reads; [B, 3, S, S] normalised."""
    return torch.stack([preprocess(render_scene(scene, preprocess.image_size)) for scene in scenes])
