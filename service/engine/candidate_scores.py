"""The progress of one match request: texts embedded, cosines known, pairs scored, answer ranked."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from model import EmbeddingKind
from service.engine.request import Match, Matches, MatchInput, Mode, Request
from service.errors import InferenceFailedError


@dataclass(slots=True, eq=False)
class CandidateScores:
    """A match request in progress, in three stages: embed its texts, compare by cosine, score its pairs.

    text_embeds: [E] of each text embedded so far. itc: cosines, once known. reranked: the candidates that
    the matching head scores, in this order. logits: (no, yes) of those it has scored.
    """

    request: Request[Matches]
    text_embeds: dict[str, Tensor]
    itc: list[float] = field(default_factory=list)
    reranked: list[int] = field(default_factory=list)
    logits: list[tuple[float, float]] = field(default_factory=list)

    @property
    def inputs(self) -> MatchInput:
        assert isinstance(self.request.inputs, MatchInput)
        return self.request.inputs

    @property
    def is_done(self) -> bool:
        return self.request.is_done

    @property
    def missing_texts(self) -> list[str]:
        return [text for text in dict.fromkeys(self.inputs.texts) if text not in self.text_embeds]

    @property
    def is_compared(self) -> bool:
        return bool(self.itc)

    def remaining_pairs(self) -> "Iterator[Pair]":
        """Yield the pairs that are not scored yet, in the order in which `logits` holds them."""
        return (Pair(self, index) for index in self.reranked[len(self.logits) :])

    def fail(self, error: Exception) -> None:
        self.request.fail(error)

    def set_cosines(self, itc: Sequence[float]) -> None:
        """Store the cosine of each candidate, and choose those the matching head scores."""
        self.itc = list(itc)
        ranked = sorted(range(len(itc)), key=lambda index: -itc[index])
        num_reranked = {
            Mode.ITC: 0,
            Mode.ITM: len(itc),
            Mode.RERANK: self.inputs.rerank_k,
        }
        self.reranked = ranked[: num_reranked[self.inputs.mode]]
        self.finish()

    def finish(self) -> None:
        """Answer the request if no pair is left to score."""
        if len(self.logits) < len(self.reranked):
            return
        matches = self._rank_by_itc() if self.inputs.mode is Mode.ITC else self._rank_by_itm()
        if all(math.isfinite(match.score) for match in matches):
            matches.sort(key=lambda match: -match.score)
            self.request.resolve(tuple(matches[: self.inputs.top_k]))
        else:
            self.fail(InferenceFailedError("the model gave a score that is not a number"))

    def _rank_by_itc(self) -> list[Match]:
        return [Match(index, cosine, cosine, None) for index, cosine in enumerate(self.itc)]

    def _rank_by_itm(self) -> list[Match]:
        matches = []
        for index, (no, yes) in zip(self.reranked, self.logits, strict=True):
            cosine = self.itc[index]
            log_probability = _log_sigmoid(yes - no)  # a softmax over two
            score = log_probability if self.inputs.mode is Mode.ITM else yes + cosine
            matches.append(Match(index, score, cosine, math.exp(log_probability)))
        return matches


@dataclass(frozen=True, slots=True)
class Pair:
    """An image and a text for the matching head. index: of the candidate."""

    scores: CandidateScores
    index: int

    @property
    def image_features(self) -> Tensor:
        images = self.scores.request.images
        image = images[self.index] if isinstance(self.scores.inputs.query, str) else images[0]
        return image.available[EmbeddingKind.IMAGE_FEATURES]  # [P, V]

    @property
    def text(self) -> str:
        inputs = self.scores.inputs
        return inputs.query if isinstance(inputs.query, str) else str(inputs.candidates[self.index])


def _log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))
