"""Models of known behaviour for the tests of gates."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from model import Generation
from training.tiny.gates import GatePlan
from training.world.captions import listing_caption
from training.world.scenes import Scene

PLAN = GatePlan(Path("unused"), num_scenes=12, num_probe_scenes=80)


def say(text: str, score: float = -1.0) -> Generation:
    return Generation(text, (1,), score, 1, "stop")


class Oracle:
    """A generator of true texts. lies: the generations that replace some of them."""

    def __init__(self, lies: dict[str, Generation] | None = None) -> None:
        self.lies = lies or {}
        self.answers = {
            (scene, item.question): item.answer
            for split in ("unseen", "held-out")
            for scenes in [PLAN.scenes(split)]
            for scene, questions in zip(scenes, PLAN.questions(scenes), strict=True)
            for item in questions
        }

    def caption(self, scenes: Sequence[Scene]) -> list[Generation]:
        return [self.generate(listing_caption(scene)) for scene in scenes]

    def answer(self, scenes: Sequence[Scene], questions: Sequence[Sequence[str]]) -> list[list[Generation]]:
        return [
            [self.generate(self.answers[scene, question]) for question in row]
            for scene, row in zip(scenes, questions, strict=True)
        ]

    def generate(self, truth: str) -> Generation:
        return self.lies.get(truth, say(truth))


class MatrixScorer:
    """A scorer of given cosines and match logits."""

    def __init__(self, cosines: Tensor, logits: Tensor) -> None:
        self.cosines, self.logits = cosines, logits
        self.scored: list[tuple[int, int]] = []

    def similarities(self) -> Tensor:
        return self.cosines

    def match_logits(self, images: Tensor, captions: Tensor) -> Tensor:
        self.scored += zip(images.tolist(), captions.tolist(), strict=True)
        yes = self.logits[images, captions]
        return torch.stack([-yes, yes], dim=1)
