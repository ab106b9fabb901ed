"""Runs generation jobs in the one decoder: they join and leave between two tokens."""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from torch import Tensor

from model import DecodeRequest, Generation, GenerationParams
from model.devices import is_out_of_memory
from service.backend import Backend, StepDecoder
from service.errors import InferenceFailedError, OutOfDeviceMemoryError
from service.jobs import GenerateJob, Lane
from service.stages.batch_size import BatchSize
from service.stages.meter import Meter
from service.stages.running import Running
from service.stages.suspects import Suspects

LONG_SHARE = 0.75  # of the rows, which long texts may hold
MAX_PROMPT_TOKENS_PER_TURN = 1024  # read in one step, those of the images included; one prompt always is


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A running job, and its answers so far: none, or those to a prompt, for each prompt."""

    running: Running
    job: GenerateJob
    generations: list[tuple[Generation, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """The prompt of this number of a request.

    encoded: what is known of the image. question: for the Q-Former, if it reads them.
    """

    request: Request
    number: int
    encoded: Tensor
    prompt_ids: tuple[int, ...]
    question: str | None

    @property
    def running(self) -> Running:
        return self.request.running

    @property
    def params(self) -> GenerationParams:
        return self.request.job.params

    @property
    def num_rows(self) -> int:
        return self.params.num_rows

    @property
    def is_long(self) -> bool:
        return self.running.lane is Lane.LONG

    @property
    def settled(self) -> bool:
        return self.running.settled


class GenerateStage:
    """Answers each job when it is due. max_rows: bounds the decoder, but one text is always let in."""

    name = "decode"

    def __init__(self, backend: Backend, *, max_rows: int, meter: Meter) -> None:
        self._backend = backend
        self._meter = meter
        self._size = BatchSize(max_rows)
        self._decoder: StepDecoder | None = None  # built when needed: a checkpoint may lack a language model
        self._waiting: deque[Text] = deque()
        self._coming: Text | None = None  # on its way into the decoder
        self._active: dict[DecodeRequest, Text] = {}
        self._was_cut = False  # the last step would have had more rows if it might
        self._suspects: Suspects[Text] = Suspects()
        self._trial: list[Text] = []  # suspects in the decoder, whom nobody may join

    def begin(self, running: Running, job: GenerateJob) -> None:
        """Takes a job whose image is encoded."""
        (kind,) = job.needs
        encoded = running.slots[0].have[kind]
        request = Request(running, job, [()] * len(job.prompts))
        for number, (prompt_ids, question) in enumerate(zip_longest(job.prompts, job.questions)):
            self._waiting.append(Text(request, number, encoded, prompt_ids, question))

    def has_work(self) -> bool:
        return bool(self._waiting or self._active or self._suspects)

    def step(self) -> None:
        """Lets in whom there is room for, and advances every running beam by one token."""
        started = time.monotonic()
        self._drop_settled()
        self._let_in()
        if self._decoder is None or not self._active:
            return
        num_rows = self._num_rows()
        self._meter.saw_rows("decode", num_rows)
        for decode_job, generations in self._decoder.step():
            text = self._active.pop(decode_job)
            text.request.generations[text.number] = generations
            if all(text.request.generations):
                _settle(text.request)
        self._size.went_well(num_rows, time.monotonic() - started, was_cut=self._was_cut)

    def recover(self, error: Exception) -> None:
        """After a failed step: finds the text at fault, or lets in fewer if memory was. All begin anew."""
        texts = list(dict.fromkeys([*self._active.values(), *self._trial]))
        if self._coming is not None and self._coming not in texts:
            texts.append(self._coming)
        self._active.clear()
        self._trial = []
        self._coming = self._decoder = None
        if is_out_of_memory(error):
            self._ran_out_of_memory(texts)
        elif culprit := self._suspects.accuse(texts):
            culprit.running.fail(error)

    def _ran_out_of_memory(self, texts: Sequence[Text]) -> None:
        num_rows = sum(text.num_rows for text in texts)
        self._meter.ran_out_of_memory("decode")
        self._backend.free_memory()
        self._size.ran_out(num_rows)
        if len(texts) > 1:
            self._waiting.extendleft(reversed(texts))
        else:
            texts[0].running.fail(_too_large(num_rows))

    def _drop_settled(self) -> None:
        if any(text.settled for text in self._waiting):
            self._waiting = deque(text for text in self._waiting if not text.settled)
        for decode_job, text in list(self._active.items()):
            if text.settled and self._decoder is not None:
                del self._active[decode_job]
                self._decoder.cancel(decode_job)

    def _let_in(self) -> None:
        num_tokens: list[int] = []
        for text in self._next_texts():
            self._coming = text
            self._decoder = self._decoder or self._backend.build_decoder()
            decode_job = self._backend.build_decode_job(
                text.encoded, text.prompt_ids, text.params, text.question
            )
            self._decoder.add(decode_job)
            self._active[decode_job] = text
            self._coming = None
            text.running.is_ahead = False
            num_tokens.append(self._num_tokens(text))
        if num_tokens:
            self._meter.saw_padding(1 - sum(num_tokens) / (len(num_tokens) * max(num_tokens)))
            num_rows = self._num_rows()
            for text in self._active.values():
                text.running.saw_rows(num_rows)

    def _next_texts(self) -> Iterator[Text]:
        if not self._active:
            self._trial = self._next_suspects()
            yield from list(self._trial)
        if not self._trial:
            yield from self._newcomers()

    def _next_suspects(self) -> list[Text]:
        while self._suspects:
            group = [text for text in self._suspects.next_group() if not text.settled]
            if len(group) > 1 and sum(map(self._num_tokens, group)) > MAX_PROMPT_TOKENS_PER_TURN:
                self._suspects.accuse(group)  # they may have come one after the other
            elif group:
                return group
        return []

    def _newcomers(self) -> Iterator[Text]:
        """Takes those out of the waiting who may enter now, oldest first.

        Long texts wait while they hold their share of the rows, and short ones pass them meanwhile; nobody
        else is passed.
        """
        num_tokens, long_wait = 0, False
        self._was_cut = False
        for text in list(self._waiting):
            long_wait = long_wait or (text.is_long and self._long_share_is_taken(text))
            if text.is_long and long_wait:
                continue
            num_tokens += self._num_tokens(text)
            if self._active and not (num_tokens <= MAX_PROMPT_TOKENS_PER_TURN and self._has_room(text)):
                return
            self._waiting.remove(text)
            yield text

    def _long_share_is_taken(self, text: Text) -> bool:
        num_long = sum(active.num_rows for active in self._active.values() if active.is_long)
        return num_long > 0 and num_long + text.num_rows > LONG_SHARE * self._size.limit

    def _has_room(self, text: Text) -> bool:
        if self._num_rows() + text.num_rows > self._size.limit:
            self._was_cut = True
            return False
        return self._decoder is None or self._decoder.has_room(self._num_tokens(text), text.params)

    def _num_tokens(self, text: Text) -> int:
        return self._backend.num_query_tokens + len(text.prompt_ids)

    def _num_rows(self) -> int:
        return sum(text.num_rows for text in self._active.values())


def _too_large(num_rows: int) -> OutOfDeviceMemoryError:
    return OutOfDeviceMemoryError(
        f"the device's memory does not hold this text's {num_rows} beams or samples beside what runs; "
        "lower num_beams or max_new_tokens, or try later"
    )


def _settle(request: Request) -> None:
    generations = tuple(request.generations)
    if all(math.isfinite(generation.score) for group in generations for generation in group):
        request.job.ticket.resolve(request.running.answer(generations))
    else:
        request.running.fail(InferenceFailedError("the model gave a score that is not a number"))
