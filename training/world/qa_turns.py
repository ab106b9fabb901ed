"""QA turns about scenes for language pre-training and stage 2: captions, descriptions and questions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.data.batches import QaBatch, QaTurn
from training.data.features import ImageFeatures
from training.world.captions import dense_words, sample_caption
from training.world.questions import sample_questions
from training.world.scenes import Scene

QUESTION_PROMPT = "Question: {} Answer:"
DENSE_PROMPT = "Describe:"
_CAPTION_WEIGHT = 0.5  # loss weight of each token; an answer's token has 1


def sample_qa_turns(scene: Scene, rng: np.random.Generator, num_questions: int) -> list[QaTurn]:
    """Sample a caption without prompt, the dense description, and `num_questions` questions of one scene."""
    return [
        QaTurn("", sample_caption(scene, rng), _CAPTION_WEIGHT),
        QaTurn(DENSE_PROMPT, " ".join(dense_words(scene)), _CAPTION_WEIGHT),
        *[
            QaTurn(QUESTION_PROMPT.format(item.question), item.answer, 1.0)
            for item in sample_questions(scene, rng, num_questions)
        ],
    ]


@dataclass(frozen=True, slots=True)
class SceneQaSampler:
    """Sampler of stage-2 batches: distinct scenes, each with its features and QA turns."""

    scenes: Sequence[Scene]
    features: ImageFeatures
    batch_size: int
    num_questions: int

    def __call__(self, _: int, rng: np.random.Generator) -> QaBatch:
        indices = rng.choice(len(self.scenes), size=self.batch_size, replace=False)
        qa_turns = [sample_qa_turns(self.scenes[int(i)], rng, self.num_questions) for i in indices]
        return QaBatch(self.features.load(indices), qa_turns)
