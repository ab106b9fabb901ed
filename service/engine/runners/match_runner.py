"""Scores candidates against queries: embeds texts, takes cosines, and runs the matching head over pairs."""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from model import EmbeddingKind
from service.engine.candidate_scores import CandidateScores, Pair
from service.engine.image_pool import ComputedEmbedding, EncodedImage
from service.engine.protocols import EngineMetrics, LocalEmbeddingCache
from service.engine.request import Mode
from service.engine.runners.text_embedder import TextEmbedder
from service.engine.step import MatchStep
from service.model_backend import Backend


class MatchRunner:
    """Runs the steps of match requests; a request is answered as soon as its last part is known."""

    def __init__(
        self,
        backend: Backend,
        embedder: TextEmbedder,
        local_cache: LocalEmbeddingCache,
        metrics: EngineMetrics,
    ) -> None:
        self._backend = backend
        self._embedder = embedder
        self._local_cache = local_cache
        self._metrics = metrics

    def run(self, step: MatchStep) -> None:
        """Embed the texts of a step, or score its pairs, or else compare its one request."""
        if step.texts:
            self._embed_texts(step.texts, step.items)
        elif step.pairs:
            self._score_pairs(step.pairs, step.items)
        else:
            (scores,) = step.items
            self._compare(scores)

    def keep_features(self, waiting: Sequence[CandidateScores], images: Collection[EncodedImage]) -> None:
        """Have match requests keep the features they need of images that were just encoded."""
        for scores in waiting:
            if not scores.keeps_features or (scores.is_selective and scores.missing_texts):
                continue
            held = [image for image in images if image in scores.indices]
            for image, cosine in zip(held, self._running_cosines(scores, held), strict=True):
                scores.keep(image, image.available[EmbeddingKind.IMAGE_FEATURES], cosine)
            if scores.is_compared or scores.inputs.mode is Mode.ITM:
                self._cache_features(scores, held)

    def _running_cosines(self, scores: CandidateScores, images: Sequence[EncodedImage]) -> list[float]:
        """Compute the cosines by which images compete for being kept; 0 where none is dropped."""
        if not scores.is_selective:
            return [0.0] * len(images)
        image_embeds = torch.stack([image.available[EmbeddingKind.IMAGE_EMBEDS] for image in images])
        text_embeds = scores.text_embeds[str(scores.inputs.query)][None]
        return self._backend.similarities(image_embeds, text_embeds)[:, 0].tolist()

    def _compare(self, scores: CandidateScores) -> None:
        scores.set_cosines(self._cosines(scores).tolist())
        if scores.keeps_features and scores.inputs.mode is Mode.RERANK:
            images = scores.request.images
            self._cache_features(scores, dict.fromkeys(images[index] for index in scores.features))

    def _cache_features(self, scores: CandidateScores, images: Iterable[EncodedImage]) -> None:
        """Keep the features of images whose pairs are scored in the cache."""
        for image in images:
            features = scores.features.get(scores.indices[image][0])
            if features is None or image.cached_features is not None:
                continue
            tensor = features.to("cpu")
            self._local_cache.put(image.digest, EmbeddingKind.IMAGE_FEATURES, tensor, is_bulk=image.is_bulk)
            if not scores.inputs.is_bulk:  # a large request would hold them all until it is answered
                image.computed.append(ComputedEmbedding(image.digest, EmbeddingKind.IMAGE_FEATURES, tensor))

    def _embed_texts(self, texts: Sequence[str], waiting: Sequence[CandidateScores]) -> None:
        embeds = self._embedder.embed(texts)
        self._backend.synchronize()
        for scores in waiting:
            scores.add_texts(embeds)

    def _score_pairs(self, pairs: Sequence[Pair], waiting: Sequence[CandidateScores]) -> None:
        image_features = torch.stack(  # [K, P, V]
            [self._backend.to_device(pair.image_features) for pair in pairs]
        )
        logits = self._backend.match_logits(image_features, [pair.text for pair in pairs])  # [K, 2]
        for pair, (no, yes) in zip(pairs, logits.tolist(), strict=True):
            pair.scores.set_logits(pair.index, no, yes)
        self._metrics.observe_batch("match", len(pairs))
        for scores in waiting:
            scores.request.observe_rows(len(pairs))
            scores.finish()

    def _cosines(self, scores: CandidateScores) -> Tensor:
        """Compute the [M] cosines of the query with each candidate, in [-1, 1]."""
        inputs = scores.inputs
        images = [
            image.available[EmbeddingKind.IMAGE_EMBEDS] for image in scores.request.images
        ]  # [Q, E] each
        texts = [scores.text_embeds[text] for text in inputs.candidates if isinstance(text, str)]  # [E] each
        if isinstance(inputs.query, str):
            query = scores.text_embeds[inputs.query]  # [E]
            if texts:
                return torch.stack(texts) @ query
            return self._backend.similarities(torch.stack(images), query[None])[:, 0]
        if texts:
            return self._backend.similarities(images[0][None], torch.stack(texts))[0]
        # Image to image: each query vector of the one with the nearest of the other, then the mean.
        return self._backend.similarities(torch.stack(images[1:]), images[0]).mean(dim=1)
