"""One request inside the service: one record from the queue to the answer, which its future returns."""

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Generic, TypeVar

from model import EmbeddingKind, Generation, GenerationParams
from service.engine.image_pool import ComputedEmbedding, EncodedImage, ImageInput
from service.errors import for_caller
from service.request_ids import REQUEST_IDS

MAX_SHORT_TOKENS: Final = 32

T = TypeVar("T")


class Mode(StrEnum):
    """How candidates are scored. itc: cosine; itm: matching head; rerank: the head on the best by cosine."""

    ITC = "itc"
    ITM = "itm"
    RERANK = "rerank"


class AdmissionClass(StrEnum):
    """Requests that are admitted by one rule: short and long share the rows, match has rows of its own."""

    SHORT = "short"  # generates at most MAX_SHORT_TOKENS tokens
    LONG = "long"  # generates more, and so holds its rows for long
    MATCH = "match"


@dataclass(frozen=True, slots=True)
class DeviceTimes:
    """Seconds in the queue, the image encoder, the Q-Former, and decoding or matching.

    Work that was shared with other requests counts in full for each.
    """

    queue_s: float
    vision_s: float
    qformer_s: float
    work_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Answer(Generic[T]):
    """The result of a request's future.

    image_cached: the request had images, and none went through the image encoder for it.
    max_rows: the largest number of rows it shared the device with.
    """

    value: T
    times: DeviceTimes
    image_cached: bool
    max_rows: int
    computed: tuple[ComputedEmbedding, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """One scored candidate.

    itc: cosine, in [-1, 1]. itm_probability: that text and image belong together; None where not computed.
    score: by mode, the cosine (itc), ln(itm_probability) (itm), match logit + cosine (rerank).
    """

    index: int
    score: float
    itc: float
    itm_probability: float | None


Generations = tuple[tuple[Generation, ...], ...]  # for each prompt, best first
Matches = tuple[Match, ...]  # best first


@dataclass(frozen=True, slots=True, eq=False)
class GenerateInput:
    """Prompts about one image, each a group of texts to generate.

    questions: what the Q-Former reads beside each prompt; none where it reads the image alone.
    """

    image: ImageInput
    prompts: tuple[tuple[int, ...], ...]
    params: GenerationParams
    questions: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[ImageInput, ...]:
        return (self.image,)

    @property
    def admission_class(self) -> AdmissionClass:
        is_short = self.params.max_new_tokens <= MAX_SHORT_TOKENS
        return AdmissionClass.SHORT if is_short else AdmissionClass.LONG

    @property
    def required(self) -> frozenset[EmbeddingKind]:
        return required_to_generate(is_question_conditioned=bool(self.questions))


@dataclass(frozen=True, slots=True, eq=False)
class MatchInput:
    """Candidates to score against one query: texts and images in any combination, but ITM needs one of each.

    rerank_k: how many of the best by ITC are scored by ITM. top_k: how many are returned.
    """

    query: str | ImageInput
    candidates: tuple[str | ImageInput, ...]
    mode: Mode
    rerank_k: int
    top_k: int

    @property
    def images(self) -> tuple[ImageInput, ...]:
        return tuple(side for side in (self.query, *self.candidates) if isinstance(side, ImageInput))

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(side for side in (self.query, *self.candidates) if isinstance(side, str))

    @property
    def admission_class(self) -> AdmissionClass:
        return AdmissionClass.MATCH

    @property
    def required(self) -> frozenset[EmbeddingKind]:
        return required_to_match(self.mode)


def required_to_generate(*, is_question_conditioned: bool) -> frozenset[EmbeddingKind]:
    """Return what generation starts from; an output that depends on the question cannot be cached."""
    return frozenset(
        {EmbeddingKind.IMAGE_FEATURES if is_question_conditioned else EmbeddingKind.QUERY_OUTPUT}
    )


def required_to_match(mode: Mode) -> frozenset[EmbeddingKind]:
    """Return what must be known of an image to score it in this mode."""
    if mode is Mode.ITC:
        return frozenset({EmbeddingKind.IMAGE_EMBEDS})
    return frozenset({EmbeddingKind.IMAGE_EMBEDS, EmbeddingKind.IMAGE_FEATURES})


@dataclass(slots=True, eq=False)
class Request(Generic[T]):
    """A caller's request. The event loop builds it; once admitted, only the engine's thread changes it.

    deadline, submitted, admitted, work_started: readings of the monotonic clock, in seconds.
    num_items: what the queue counts: captions, questions or candidates. image_cached: see `Answer`.
    holds_rows: whether one of its sequences has entered the decoder. request_ids: for log lines; one where
    a caller sent it.
    """

    inputs: GenerateInput | MatchInput
    deadline: float | None = None
    num_items: int = 1
    submitted: float = field(default_factory=time.monotonic)
    future: Future[Answer[T]] = field(default_factory=Future)
    images: tuple[EncodedImage, ...] = ()
    image_cached: bool = False
    holds_rows: bool = False
    admitted: float | None = None
    work_started: float | None = None
    max_rows: int = 1
    request_ids: tuple[str, ...] = field(default_factory=REQUEST_IDS.get)
    _claim_lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def admission_class(self) -> AdmissionClass:
        return self.inputs.admission_class

    @property
    def is_done(self) -> bool:
        """Whether nobody waits any more: answered, failed, or abandoned by the caller."""
        return self.future.done()

    @property
    def is_encoded(self) -> bool:
        return all(image.satisfies(self.inputs.required) for image in self.images)

    @property
    def image_error(self) -> Exception | None:
        return next((image.error for image in self.images if image.error is not None), None)

    def has_expired(self, now: float) -> bool:
        return self.deadline is not None and now >= self.deadline

    def observe_rows(self, num_rows: int) -> None:
        self.max_rows = max(self.max_rows, num_rows)

    def resolve(self, value: T) -> None:
        """Complete the future with a value; no effect where the request is done."""
        answer = self._build_answer(value)  # before the claim: a claimed future must be completed
        if self._claim():
            self.future.set_result(answer)

    def fail(self, error: Exception) -> None:
        """Complete the future with what the caller may know of an error; no effect where it is done."""
        if self._claim():
            self.future.set_exception(for_caller(error))

    def _claim(self) -> bool:
        # The caller may cancel at any moment from the event loop; past this call it no longer can. The engine
        # and the watchdog that aborts it may both try to complete the future.
        with self._claim_lock:
            is_free = not (self.future.done() or self.future.running())
            return is_free and self.future.set_running_or_notify_cancel()

    def _build_answer(self, value: T) -> Answer[T]:
        assert self.admitted is not None
        assert self.work_started is not None
        # Passes before this request was admitted did not cost it time; those it shared count in full.
        batches = {
            batch for image in self.images for batch in image.batches if batch.started >= self.admitted
        }
        return Answer(
            value=value,
            times=DeviceTimes(
                queue_s=self.admitted - self.submitted,
                vision_s=sum(batch.vision_s for batch in batches),
                qformer_s=sum(batch.qformer_s for batch in batches),
                work_s=time.monotonic() - self.work_started,
            ),
            image_cached=self.image_cached,
            max_rows=max([self.max_rows, *(batch.num_images for batch in batches)]),
            computed=tuple(computed for image in self.images for computed in image.drain_computed()),
        )


AnyRequest = Request[Any]
