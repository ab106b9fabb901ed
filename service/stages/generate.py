"""Runs generation jobs in the one decoder: they join and leave between two tokens."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest

from model import DecodeJob, Generation
from service.backend import Backend, StepDecoder
from service.errors import InferenceFailedError
from service.jobs import GenerateJob
from service.stages.running import Running


@dataclass(slots=True, eq=False)
class Text:
    """One prompt of a running job, which holds one group of texts for each prompt."""

    running: Running
    job: GenerateJob
    group: "list[Text]"
    decode_job: DecodeJob
    generations: tuple[Generation, ...] = ()
    suspect: bool = False

    @property
    def num_rows(self) -> int:
        return self.decode_job.params.num_rows

    @property
    def settled(self) -> bool:
        return self.running.settled


class GenerateStage:
    """Answers each job when it is due. max_rows: bounds the decoder, but one job is always let in."""

    def __init__(self, backend: Backend, *, max_rows: int, rows_seen: Callable[[str, int], None]) -> None:
        self._backend = backend
        self._max_rows = max_rows
        self._rows_seen = rows_seen
        self._decoder: StepDecoder | None = None  # built when needed: a checkpoint may lack a language model
        self._waiting: deque[Text] = deque()
        self._active: dict[DecodeJob, Text] = {}

    def begin(self, running: Running, job: GenerateJob) -> None:
        """Takes a job whose image is encoded."""
        (kind,) = job.needs
        encoded = running.slots[0].have[kind]
        group: list[Text] = []
        for prompt_ids, question in zip_longest(job.prompts, job.questions):
            decode_job = self._backend.build_decode_job(encoded, prompt_ids, job.params, question)
            group.append(Text(running, job, group, decode_job))
        self._waiting.extend(group)

    def step(self) -> None:
        """Lets in whom there is room for, and advances every running beam by one token."""
        if not (self._waiting or self._active):
            return
        if self._decoder is None:
            self._decoder = self._backend.build_decoder()
        self._drop_settled(self._decoder)
        self._let_in(self._decoder)
        if not self._active:
            return
        self._rows_seen("decode", self._num_rows())
        for decode_job, generations in self._decoder.step():
            text = self._active.pop(decode_job)
            text.generations = generations
            if all(sibling.generations for sibling in text.group):
                _settle(text)

    def isolate(self, error: Exception) -> None:
        """After a failed step: blames the only text in the decoder, else has each of them run alone, anew."""
        texts = list(self._active.values())
        self._active.clear()
        self._decoder = None
        if len(texts) == 1:
            texts[0].running.fail(error)
            return
        for text in texts:
            text.suspect = True
        self._waiting.extendleft(reversed(texts))

    def _drop_settled(self, decoder: StepDecoder) -> None:
        if any(text.settled for text in self._waiting):
            self._waiting = deque(text for text in self._waiting if not text.settled)
        for text in [text for text in self._active.values() if text.settled]:
            del self._active[text.decode_job]
            decoder.cancel(text.decode_job)

    def _let_in(self, decoder: StepDecoder) -> None:
        before = len(self._active)
        while self._waiting and self._fits(self._waiting[0]):
            text = self._waiting.popleft()
            self._active[text.decode_job] = text
            decoder.add(text.decode_job)
        if len(self._active) > before:
            num_rows = self._num_rows()
            for text in self._active.values():
                text.running.saw_rows(num_rows)

    def _fits(self, text: Text) -> bool:
        if not self._active:
            return True
        if text.suspect or any(active.suspect for active in self._active.values()):
            return False
        return self._num_rows() + text.num_rows <= self._max_rows

    def _num_rows(self) -> int:
        return sum(text.num_rows for text in self._active.values())


def _settle(text: Text) -> None:
    generations = tuple(sibling.generations for sibling in text.group)
    if all(math.isfinite(generation.score) for group in generations for generation in group):
        text.job.ticket.resolve(text.running.answer(generations))
    else:
        text.running.fail(InferenceFailedError("the model gave a score that is not a number"))
