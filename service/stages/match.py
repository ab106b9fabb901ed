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
_MAX_TEXTS_KEPT = 8192  # a kilobyte each


@dataclass(slots=True, eq=False)
class Scoring:
    """A match job under way. chosen: the candidates that the matching head scores, in this order."""

    running: Running
    job: MatchJob
    itc: list[float]
    chosen: list[int]
    logits: list[tuple[float, float]] = field(default_factory=list)

    @property
    def remaining(self) -> list[int]:
        return self.chosen[len(self.logits) :]


class MatchStage:
    """Answers each job as soon as it is scored. rows_seen(stage, rows) is told of every chunk."""

    def __init__(self, backend: Backend, *, rows_seen: Callable[[str, int], None]) -> None:
        self._backend = backend
        self._rows_seen = rows_seen
        self._embed_texts = TextEmbeds(backend.embed_texts, max_texts=_MAX_TEXTS_KEPT)
        self._scorings: list[Scoring] = []

    @property
    def scorings(self) -> list[Scoring]:
        """Those under way that somebody still waits for."""
        self._scorings = [s for s in self._scorings if not s.running.settled]
        return self._scorings

    def begin(self, running: Running, job: MatchJob) -> None:
        """Takes a job whose images are encoded, and computes its cosines."""
        itc: list[float] = self._similarities(running, job).tolist()
        ranked = sorted(range(len(itc)), key=lambda index: -itc[index])
        num_chosen = {Mode.ITC: 0, Mode.ITM: len(itc), Mode.RERANK: job.rerank_k}[job.mode]
        scoring = Scoring(running, job, itc, ranked[:num_chosen])
        if scoring.chosen:
            self._scorings.append(scoring)
        else:
            _settle(scoring)

    def step(self, scoring: Scoring) -> None:
        """Scores one chunk of the pairs of one job."""
        indices = scoring.remaining[:MAX_PAIRS_PER_TURN]
        image_features, texts = _pairs(scoring, indices)
        logits = self._backend.match_logits(image_features, texts)  # [K, 2]
        scoring.logits.extend((no, yes) for no, yes in logits.tolist())
        self._rows_seen("match", len(indices))
        scoring.running.saw_rows(len(indices))
        if not scoring.remaining:
            _settle(scoring)

    def _similarities(self, running: Running, job: MatchJob) -> Tensor:
        """Gives [M] cosines of the query with each candidate, in [-1, 1]."""
        candidate_texts = [side for side in job.candidates if isinstance(side, str)]
        embeds = [slot.have[Kind.IMAGE_EMBEDS] for slot in running.slots]  # [Q, E] each
        if isinstance(job.query, str):
            query = self._embed_texts([job.query])  # [1, E]
            if candidate_texts:
                return self._embed_texts(candidate_texts) @ query[0]
            return self._backend.similarities(torch.stack(embeds), query)[:, 0]
        if candidate_texts:
            return self._backend.similarities(embeds[0][None], self._embed_texts(candidate_texts))[0]
        # Image to image: each query vector of the one with the nearest of the other, then the mean.
        return self._backend.similarities(torch.stack(embeds[1:]), embeds[0]).mean(dim=1)


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
