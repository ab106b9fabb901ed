"""What a language model is asked about a scene, and what it should say: captions, descriptions, answers.

An exchange is a prompt with its answer, whatever the kind of language model: a decoder-only one reads the
prompt and goes on with the answer, an encoder-decoder one encodes the former and decodes the latter.
"""

from dataclasses import dataclass

import numpy as np

from training.world.captions import dense_words, sample_caption
from training.world.questions import sample_questions
from training.world.scenes import Scene

QUESTION_PROMPT = "Question: {} Answer:"
DENSE_PROMPT = "Describe:"
_CAPTION_WEIGHT = 0.5  # of each word; one of an answer counts 1


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt (empty: none), the answer to it, and the loss weight of each of the answer's words."""

    prompt: str
    answer: str
    weight: float


def sample_exchanges(scene: Scene, rng: np.random.Generator, num_questions: int) -> list[Exchange]:
    """A caption without prompt, the dense description, and `num_questions` questions of one scene."""
    return [
        Exchange("", sample_caption(scene, rng), _CAPTION_WEIGHT),
        Exchange(DENSE_PROMPT, " ".join(dense_words(scene)), _CAPTION_WEIGHT),
        *[
            Exchange(QUESTION_PROMPT.format(item.question), item.answer, 1.0)
            for item in sample_questions(scene, rng, num_questions)
        ],
    ]
