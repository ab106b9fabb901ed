"""Scores candidates against a query: cosines at once, then the matching head in bounded batches of pairs."""

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from model.devices import is_out_of_memory
from service.engine.batch_size import TURN_S, BatchSize
from service.engine.engine_metrics import Meter
from service.engine.isolation import Suspects
from service.engine.request import Kind, Match, MatchJob, Mode
from service.engine.sequence import Running
from service.engine.text_embeds import TextEmbeds
from service.errors import InferenceFailedError, OutOfDeviceMemoryError
from service.model_backend import Backend

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


@dataclass(frozen=True, slots=True)
class Batch:
    """What is in hand: so many texts or pairs of these jobs, and what bounds them."""

    size: BatchSize
    scorings: Sequence[Scoring] = ()
    count: int = 0
    started: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Pair:
    """An image and a text for the matching head."""

    scoring: Scoring
    index: int  # of the candidate

    @property
    def image_features(self) -> Tensor:
        slots = self.scoring.running.slots
        slot = slots[self.index] if isinstance(self.scoring.job.query, str) else slots[0]
        return slot.have[Kind.IMAGE_FEATURES]  # [P, V]

    @property
    def text(self) -> str:
        job = self.scoring.job
        return job.query if isinstance(job.query, str) else str(job.candidates[self.index])


class MatchStage:
    """Answers each job as soon as it is scored. A step is one batch: of texts, or of pairs."""

    name = "match"

    def __init__(self, backend: Backend, *, meter: Meter) -> None:
        self._backend = backend
        self._meter = meter
        self._text_embeds = TextEmbeds(backend.embed_texts, max_texts=_MAX_TEXTS_KEPT)
        self._text_size = BatchSize(MAX_TEXTS_PER_TURN, turn_s=TURN_S)
        self._pair_size = BatchSize(MAX_PAIRS_PER_TURN, turn_s=TURN_S)
        self._scorings: deque[Scoring] = deque()
        self._suspects: Suspects[Scoring] = Suspects()
        self._batch: Batch | None = None

    def begin(self, running: Running, job: MatchJob) -> None:
        """Takes a job whose images are encoded."""
        self._scorings.append(Scoring(running, job, self._text_embeds.recall(job.texts)))

    def has_work(self) -> bool:
        self._forget_settled()
        return bool(self._scorings)

    def step(self) -> None:
        """Does one batch for the job whose turn it is, filled up with the like of those behind it."""
        scorings = self._next_group()
        if scorings[0].lacking_texts:
            self._embed_texts(scorings)
        else:
            self._score([scoring for scoring in scorings if not scoring.lacking_texts])
        batch, self._batch = self._batch, None
        if batch is not None and batch.count:
            was_cut = batch.count >= batch.size.limit
            batch.size.went_well(batch.count, time.monotonic() - batch.started, was_cut=was_cut)
        self._forget_settled()

    def recover(self, error: Exception) -> None:
        """After a failed step: finds the job at fault, or takes fewer at once if memory was."""
        batch, self._batch = self._batch, None
        assert batch is not None
        if is_out_of_memory(error):
            self._meter.ran_out_of_memory("match")
            self._backend.free_memory()
            if batch.count:
                batch.size.ran_out(batch.count)
            if batch.count <= 1:
                batch.scorings[0].running.fail(_too_large())
        elif culprit := self._suspects.accuse(batch.scorings):
            culprit.running.fail(error)

    def _forget_settled(self) -> None:
        self._scorings = deque(scoring for scoring in self._scorings if not scoring.running.settled)
        if not self._scorings:
            self._suspects.clear()

    def _next_group(self) -> Sequence[Scoring]:
        while self._suspects:
            if group := [scoring for scoring in self._suspects.next_group() if not scoring.running.settled]:
                return group
        scorings = list(self._scorings)
        self._scorings.rotate(-1)
        return scorings

    def _embed_texts(self, scorings: Sequence[Scoring]) -> None:
        lacking = dict.fromkeys(text for scoring in scorings for text in scoring.lacking_texts)
        texts = list(islice(lacking, self._text_size.limit))
        waiting = [scoring for scoring in scorings if not set(texts).isdisjoint(scoring.lacking_texts)]
        self._batch = Batch(self._text_size, waiting, len(texts))
        embeds = self._text_embeds.embed(texts)
        self._backend.synchronize()
        for scoring in waiting:
            scoring.texts |= {text: embeds[text] for text in scoring.lacking_texts if text in embeds}

    def _score(self, scorings: Sequence[Scoring]) -> None:
        for scoring in scorings:
            self._batch = Batch(self._pair_size, [scoring])
            if not scoring.itc:
                self._compare(scoring)
        waiting = (Pair(scoring, index) for scoring in scorings for index in scoring.remaining)
        self._score_pairs(list(islice(waiting, self._pair_size.limit)))

    def _compare(self, scoring: Scoring) -> None:
        job = scoring.job
        scoring.itc = itc = self._similarities(scoring).tolist()
        ranked = sorted(range(len(itc)), key=lambda index: -itc[index])
        scoring.chosen = ranked[: {Mode.ITC: 0, Mode.ITM: len(itc), Mode.RERANK: job.rerank_k}[job.mode]]
        if not scoring.remaining:
            _settle(scoring)

    def _score_pairs(self, pairs: Sequence[Pair]) -> None:
        scorings = list(dict.fromkeys(pair.scoring for pair in pairs))
        self._batch = Batch(self._pair_size, scorings, len(pairs))
        if not pairs:
            return
        image_features = torch.stack([pair.image_features for pair in pairs])  # [K, P, V]
        logits = self._backend.match_logits(image_features, [pair.text for pair in pairs])  # [K, 2]
        for pair, (no, yes) in zip(pairs, logits.tolist(), strict=True):
            pair.scoring.logits.append((no, yes))
        self._meter.saw_rows("match", len(pairs))
        for scoring in scorings:
            scoring.running.saw_rows(len(pairs))
            if not scoring.remaining:
                _settle(scoring)

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


def _too_large() -> OutOfDeviceMemoryError:
    return OutOfDeviceMemoryError(
        "the device's memory does not hold one more text or pair beside what runs; try again later"
    )


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
