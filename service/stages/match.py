"""Scores candidates against a query: cosines at once, then the matching head in bounded chunks of pairs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from service.backend import Backend
from service.errors import InferenceFailedError
from service.jobs import Kind, Match, MatchJob, Mode
from service.stages.running import Running
from service.stages.texts import TextEmbeds

MAX_PAIRS_PER_TURN = 32
MAX_TEXTS_PER_TURN = 64
_MAX_TEXTS_KEPT = 8192  # a kilobyte each


@dataclass(slots=True, eq=False)
class Scoring:
    """A match job under way, in three parts: its texts are embedded, its cosines taken, its pairs scored.

    texts: the embeddings so far. itc: the cosines, once they are known. chosen: the candidates that the
    matching head scores, in this order. logits: those it has scored.
    """

    running: Running
    job: MatchJob
    texts: dict[str, Tensor]
    itc: list[float] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    logits: list[tuple[float, float]] = field(default_factory=list)

    @property
    def lacking_texts(self) -> list[str]:
        return [text for text in dict.fromkeys(self.job.texts) if text not in self.texts]

    @property
    def remaining(self) -> list[int]:
        return self.chosen[len(self.logits) :]


class MatchStage:
    """Answers each job as soon as it is scored. rows_seen(stage, rows) is told of every chunk."""

    def __init__(self, backend: Backend, *, rows_seen: Callable[[str, int], None]) -> None:
        self._backend = backend
        self._rows_seen = rows_seen
        self._text_embeds = TextEmbeds(backend.embed_texts, max_texts=_MAX_TEXTS_KEPT)
        self._scorings: list[Scoring] = []

    def begin(self, running: Running, job: MatchJob) -> None:
        """Takes a job whose images are encoded."""
        self._scorings.append(Scoring(running, job, self._text_embeds.recall(job.texts)))

    def under_way(self) -> list[Scoring]:
        """Gives the jobs to be stepped; forgets those that are answered, or that nobody waits for."""
        self._scorings = [scoring for scoring in self._scorings if not scoring.running.settled]
        return self._scorings

    def step(self, scoring: Scoring) -> None:
        """Does as much of one job as a turn has room for."""
        lacking = scoring.lacking_texts
        if lacking:
            scoring.texts |= self._text_embeds.embed(lacking[:MAX_TEXTS_PER_TURN])
        if len(lacking) > MAX_TEXTS_PER_TURN:
            return
        if not scoring.itc:
            self._compare(scoring)
        if scoring.remaining:
            self._score_pairs(scoring)
        if not scoring.remaining:
            _settle(scoring)

    def _compare(self, scoring: Scoring) -> None:
        job = scoring.job
        scoring.itc = itc = self._similarities(scoring).tolist()
        ranked = sorted(range(len(itc)), key=lambda index: -itc[index])
        scoring.chosen = ranked[: {Mode.ITC: 0, Mode.ITM: len(itc), Mode.RERANK: job.rerank_k}[job.mode]]

    def _score_pairs(self, scoring: Scoring) -> None:
        indices = scoring.remaining[:MAX_PAIRS_PER_TURN]
        image_features, texts = _pairs(scoring, indices)
        logits = self._backend.match_logits(image_features, texts)  # [K, 2]
        scoring.logits.extend((no, yes) for no, yes in logits.tolist())
        self._rows_seen("match", len(indices))
        scoring.running.saw_rows(len(indices))

    def _similarities(self, scoring: Scoring) -> Tensor:
        """Gives [M] cosines of the query with each candidate, in [-1, 1]."""
        job = scoring.job
        images = [slot.have[Kind.IMAGE_EMBEDS] for slot in scoring.running.slots]  # [Q, E] each
        candidates = [scoring.texts[text] for text in job.candidates if isinstance(text, str)]  # [E] each
        if isinstance(job.query, str):
            query = scoring.texts[job.query]  # [E]
            if candidates:
                return torch.stack(candidates) @ query
            return self._backend.similarities(torch.stack(images), query[None])[:, 0]
        if candidates:
            return self._backend.similarities(images[0][None], torch.stack(candidates))[0]
        # Image to image: each query vector of the one with the nearest of the other, then the mean.
        return self._backend.similarities(torch.stack(images[1:]), images[0]).mean(dim=1)


def _pairs(scoring: Scoring, indices: list[int]) -> tuple[Tensor, list[str]]:
    job, slots = scoring.job, scoring.running.slots
    if isinstance(job.query, str):
        texts = [job.query] * len(indices)
        features = [slots[index].have[Kind.IMAGE_FEATURES] for index in indices]
    else:
        texts = [str(job.candidates[index]) for index in indices]
        features = [slots[0].have[Kind.IMAGE_FEATURES]] * len(indices)
    return torch.stack(features), texts  # [K, P, V]


def _settle(scoring: Scoring) -> None:
    matches = _score_by_itc(scoring) if scoring.job.mode is Mode.ITC else _score_by_itm(scoring)
    if all(math.isfinite(match.score) for match in matches):
        matches.sort(key=lambda match: -match.score)
        scoring.job.ticket.resolve(scoring.running.answer(tuple(matches[: scoring.job.top_k])))
    else:
        scoring.running.fail(InferenceFailedError("the model gave a score that is not a number"))


def _score_by_itc(scoring: Scoring) -> list[Match]:
    return [Match(index, cosine, cosine, None) for index, cosine in enumerate(scoring.itc)]


def _score_by_itm(scoring: Scoring) -> list[Match]:
    matches = []
    for index, (no, yes) in zip(scoring.chosen, scoring.logits, strict=True):
        cosine = scoring.itc[index]
        log_probability = _log_sigmoid(yes - no)  # a softmax over two
        score = log_probability if scoring.job.mode is Mode.ITM else yes + cosine
        matches.append(Match(index, score, cosine, math.exp(log_probability)))
    return matches


def _log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))
