"""The progress of one match request: texts embedded, images encoded and compared, pairs scored."""

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from model import EmbeddingKind
from service.engine.image_pool import EncodedImage
from service.engine.request import MAX_PAIRS_PER_STEP, Match, Matches, MatchInput, Mode, Request
from service.errors import InferenceFailedError


class CandidateScores:
    """A match request in progress: embed its texts, encode its images, compare by cosine, score its pairs.

    Candidate images of a text are ranked while they are encoded. Only the features of those that the matching
    head may score are kept: of the best `rerank_k` so far, or in mode itm of a batch of pairs.

    indices: of the candidates that an image is. features: [P, V] by candidate, until its pair is scored.
    text_embeds: [E] of each text embedded so far. itc: cosines, once all are known. reranked: the candidates
    that the matching head scores, in this order. logits: (no, yes) of those it has scored.
    """

    def __init__(self, request: Request[Matches], text_embeds: Mapping[str, Tensor]) -> None:
        self.request = request
        self.text_embeds = dict(text_embeds)
        self.missing_texts = dict.fromkeys(text for text in self.inputs.texts if text not in text_embeds)
        self.indices: dict[EncodedImage, list[int]] = {}
        if self.inputs.ranks_images:
            for index, image in enumerate(request.images):
                self.indices.setdefault(image, []).append(index)
        self.features: dict[int, Tensor] = {}
        self.itc: list[float] = []
        self.reranked: list[int] = []
        self.logits: dict[int, tuple[float, float]] = {}
        self.images = frozenset(request.images)
        self._unencoded = dict.fromkeys(request.images)
        self._best: list[tuple[float, int]] = []  # (-cosine, index) of the best so far

    @property
    def inputs(self) -> MatchInput:
        assert isinstance(self.request.inputs, MatchInput)
        return self.request.inputs

    @property
    def is_done(self) -> bool:
        return self.request.is_done

    @property
    def is_compared(self) -> bool:
        return bool(self.itc)

    @property
    def is_selective(self) -> bool:
        """Whether the features of some images are dropped, because others are better."""
        inputs = self.inputs
        return inputs.mode is Mode.RERANK and inputs.ranks_images and inputs.rerank_k < len(inputs.candidates)

    @property
    def keeps_features(self) -> bool:
        """Whether the matching head scores candidate images, whose features are kept until then."""
        return bool(self.indices) and self.inputs.mode is not Mode.ITC

    @property
    def is_full(self) -> bool:
        """Whether a batch of pairs of mode itm is to be scored before more images are encoded."""
        return self.inputs.mode is Mode.ITM and len(self.features) >= MAX_PAIRS_PER_STEP

    @property
    def has_pairs(self) -> bool:
        """Whether its next work is to score pairs."""
        return not self.missing_texts and (self.is_compared or self.is_full)

    @property
    def is_ready(self) -> bool:
        """Whether it has texts to embed, candidates to compare or pairs to score now."""
        return bool(self.missing_texts) or self.is_full or not (self.next_images(1) or self.is_done)

    def add_texts(self, embeds: Mapping[str, Tensor]) -> None:
        """Store the embeddings of texts that were missing."""
        for text in [text for text in self.missing_texts if text in embeds]:
            self.text_embeds[text] = embeds[text]
            del self.missing_texts[text]

    def next_images(self, count: int) -> list[EncodedImage]:
        """Return up to `count` images to be encoded now; fail where one of them cannot be.

        None while the text by which they are ranked is not embedded, or while `is_full`.
        """
        if self.is_done or self.is_full or (self.indices and self.missing_texts):
            return []
        found, encoded = list[EncodedImage](), list[EncodedImage]()
        for image in self._unencoded:
            if image.error is not None:
                self.fail(image.error)
                return []
            (found if self._requires(image) else encoded).append(image)
            if len(found) == count:
                break
        for image in encoded:
            del self._unencoded[image]
        return found

    def _requires(self, image: EncodedImage) -> bool:
        if image.is_pending:
            return True
        if not self.keeps_features or (self.inputs.mode is Mode.RERANK and not self.is_compared):
            return False
        return any(index not in self.features and index not in self.logits for index in self.indices[image])

    def keep(self, image: EncodedImage, features: Tensor, cosine: float) -> None:
        """Keep the [P, V] features of an image, if its pair may be scored."""
        for index in self.indices[image]:
            if index in self.features or index in self.logits or self.is_full:
                continue
            if self.is_compared and index not in self.reranked:
                continue
            self.features[index] = features
            if self.is_selective and not self.is_compared:
                bisect.insort(self._best, (-cosine, index))
                if len(self._best) > self.inputs.rerank_k:
                    del self.features[self._best.pop()[1]]

    def remaining_pairs(self) -> "Iterator[Pair]":
        """Yield the pairs that can be scored now."""
        if self.keeps_features and self.inputs.mode is Mode.ITM:
            return (Pair(self, index) for index in list(self.features))
        return (Pair(self, index) for index in self.reranked if index not in self.logits)

    def fail(self, error: Exception) -> None:
        self.request.fail(error)

    def set_cosines(self, itc: Sequence[float]) -> None:
        """Store the cosine of each candidate, and choose those the matching head scores.

        Fail where one is not finite: there would be no order.
        """
        if not all(map(math.isfinite, itc)):
            self._fail_as_not_a_number()
            return
        self.itc = list(itc)
        ranked = sorted(range(len(itc)), key=lambda index: -itc[index])
        num_reranked = {
            Mode.ITC: 0,
            Mode.ITM: len(itc),
            Mode.RERANK: self.inputs.rerank_k,
        }
        self.reranked = ranked[: num_reranked[self.inputs.mode]]
        if self.keeps_features:
            self._choose_features()
        self.finish()

    def _choose_features(self) -> None:
        """Drop the features of images that are not among the best; those that lack theirs are encoded."""
        images = [self.request.images[index] for index in self.reranked]
        chosen = set(self.reranked)
        self.features = {index: features for index, features in self.features.items() if index in chosen}
        self._unencoded = {image: None for image in images if self._requires(image)}

    def set_logits(self, index: int, no: float, yes: float) -> None:
        """Store the logits of a pair, and drop the features of its image; fail where they are not finite."""
        if not math.isfinite(no + yes):
            self._fail_as_not_a_number()
        self.logits[index] = (no, yes)
        self.features.pop(index, None)

    def finish(self) -> None:
        """Answer the request if it is compared and no pair is left to score."""
        if not self.is_compared or len(self.logits) < len(self.reranked):
            return
        matches = self._rank_by_itc() if self.inputs.mode is Mode.ITC else self._rank_by_itm()
        matches.sort(key=lambda match: -match.score)
        self.request.resolve(tuple(matches[: self.inputs.top_k]))

    def _fail_as_not_a_number(self) -> None:
        self.fail(InferenceFailedError("the model gave a score that is not a number"))

    def _rank_by_itc(self) -> list[Match]:
        return [Match(index, cosine, cosine, None) for index, cosine in enumerate(self.itc)]

    def _rank_by_itm(self) -> list[Match]:
        matches = []
        for index in self.reranked:
            no, yes = self.logits[index]
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
        if self.scores.indices:
            return self.scores.features[self.index]  # [P, V]
        return self.scores.request.images[0].available[EmbeddingKind.IMAGE_FEATURES]

    @property
    def text(self) -> str:
        inputs = self.scores.inputs
        return inputs.query if isinstance(inputs.query, str) else str(inputs.candidates[self.index])


def _log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))
