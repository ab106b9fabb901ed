"""Scores candidates against queries: embeds texts, takes cosines, and runs the matching head over pairs."""

from collections.abc import Iterable, Sequence
from typing import Final

import torch
from cachetools import LRUCache
from torch import Tensor

from model import EmbeddingKind
from service.engine.candidate_scores import CandidateScores, Pair
from service.engine.protocols import EngineMetrics
from service.engine.step import MatchStep
from service.model_backend import Backend

MAX_TEXTS_KEPT: Final = 8192  # a kilobyte each


class TextEmbedder:
    """Embeds texts and keeps the results: the same labels and queries come again with every image.

    max_texts: how many are kept, least recently used out first. For the engine's thread alone.
    """

    def __init__(self, backend: Backend, *, max_texts: int = MAX_TEXTS_KEPT) -> None:
        self._backend = backend
        self._known: LRUCache[str, Tensor] = LRUCache(max_texts)

    def get_cached(self, texts: Iterable[str]) -> dict[str, Tensor]:
        """Return the [E] embedding of each text that is known; counts as a use."""
        return {text: self._known[text] for text in texts if text in self._known}

    def embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Embed texts in one batch, and keep the results."""
        rows = self._backend.embed_texts(texts)  # [M, E]
        embeds = {
            text: row.clone() for text, row in zip(texts, rows, strict=True)
        }  # a view would keep all rows
        self._known.update(embeds)
        return embeds


class MatchRunner:
    """Runs the steps of match requests; a request is answered as soon as its last part is known."""

    def __init__(self, backend: Backend, embedder: TextEmbedder, metrics: EngineMetrics) -> None:
        self._backend = backend
        self._embedder = embedder
        self._metrics = metrics

    def run(self, step: MatchStep) -> None:
        """Embed the texts of a step, or score its pairs, or else compare its one request."""
        if step.texts:
            self._embed_texts(step.texts, step.items)
        elif step.pairs:
            self._score_pairs(step.pairs, step.items)
        else:
            (scores,) = step.items
            scores.set_cosines(self._cosines(scores).tolist())

    def _embed_texts(self, texts: Sequence[str], waiting: Sequence[CandidateScores]) -> None:
        embeds = self._embedder.embed(texts)
        self._backend.synchronize()
        for scores in waiting:
            scores.text_embeds |= {text: embeds[text] for text in scores.missing_texts if text in embeds}

    def _score_pairs(self, pairs: Sequence[Pair], waiting: Sequence[CandidateScores]) -> None:
        image_features = torch.stack([pair.image_features for pair in pairs])  # [K, P, V]
        logits = self._backend.match_logits(image_features, [pair.text for pair in pairs])  # [K, 2]
        for pair, (no, yes) in zip(pairs, logits.tolist(), strict=True):
            pair.scores.logits.append((no, yes))
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
