"""One request inside the service: one record from the queue to the answer, which its future returns."""

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Final, Generic, TypeVar

from model import EmbeddingKind, Generation, GenerationParams
from service.engine.image_pool import ComputedEmbedding, EncodeBatch, EncodedImage, ImageInput
from service.errors import for_caller
from service.request_ids import REQUEST_IDS

MAX_SHORT_TOKENS: Final = 32  # of each answer: how many steps a short request may hold its rows
MAX_SHORT_ROW_TOKENS: Final = 2048  # of a whole request: as much as 16 steps of 128 rows
MIN_BULK_CANDIDATES: Final = 65  # of a match request that no other need wait for
MAX_PAIRS_PER_STEP: Final = 32

T = TypeVar("T")


class Mode(StrEnum):
    """How candidates are scored. itc: cosine; itm: matching head; rerank: the head on the best by cosine."""

    ITC = "itc"
    ITM = "itm"
    RERANK = "rerank"


class AdmissionClass(StrEnum):
    """Requests that are admitted by one rule: short and long share the rows, match ones have their own."""

    SHORT = "short"  # at most MAX_SHORT_TOKENS tokens an answer, and MAX_SHORT_ROW_TOKENS in all
    LONG = "long"  # more: it holds its rows for long, or many of them
    MATCH = "match"
    BULK_MATCH = "bulk_match"  # of MIN_BULK_CANDIDATES or more


@dataclass(frozen=True, slots=True)
class DeviceTimes:
    """Seconds in the queue, the image encoder, the Q-Former, and decoding or matching.

    queue_s: until the work began (generation: until its first sequence had rows), less the passes of image
    encoder and Q-Former until then. work_s: since then, less the passes since then. Passes that were
    shared with other requests count in full for each.
    """

    queue_s: float
    vision_s: float
    qformer_s: float
    work_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Answer(Generic[T]):
    """The result of a request's future.

    image_cached: it had images, and none went through the image encoder for it. max_rows: the largest
    number of rows it shared the device with.
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
    is_bulk: ClassVar[bool] = False

    @property
    def images(self) -> tuple[ImageInput, ...]:
        return (self.image,)

    @property
    def num_rows(self) -> int:
        """Number of rows it may hold at once: beams and samples of all prompts."""
        return len(self.prompts) * self.params.num_rows

    @property
    def cost(self) -> int:
        """Number of row-tokens: rows times the most tokens of each."""
        return self.num_rows * self.params.max_new_tokens

    @property
    def early_cost(self) -> float:
        """Number of row-tokens before the last prompt."""
        return self.cost * (1 - 1 / len(self.prompts))

    @property
    def admission_class(self) -> AdmissionClass:
        is_short = self.params.max_new_tokens <= MAX_SHORT_TOKENS and self.cost <= MAX_SHORT_ROW_TOKENS
        return AdmissionClass.SHORT if is_short else AdmissionClass.LONG

    @property
    def required(self) -> frozenset[EmbeddingKind]:
        return required_to_generate(is_question_conditioned=bool(self.questions))


@dataclass(frozen=True, slots=True, eq=False)
class MatchInput:
    """Candidates to score against a query: texts and images in any combination, but ITM needs one of each.

    rerank_k: how many of the best by ITC are scored by ITM. top_k: how many are returned.
    """

    query: str | ImageInput
    candidates: tuple[str | ImageInput, ...]
    mode: Mode
    rerank_k: int
    top_k: int

    @property
    def is_bulk(self) -> bool:
        """Whether it has so many candidates that it may take a share of queue and cache only."""
        return self.cost >= MIN_BULK_CANDIDATES

    @property
    def ranks_images(self) -> bool:
        """Whether the query is a text and the candidates are images."""
        return isinstance(self.query, str) and not isinstance(self.candidates[0], str)

    @property
    def images(self) -> tuple[ImageInput, ...]:
        return tuple(side for side in (self.query, *self.candidates) if isinstance(side, ImageInput))

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(side for side in (self.query, *self.candidates) if isinstance(side, str))

    @property
    def num_rows(self) -> int:
        """Number of rows it may hold at once: pairs."""
        return min(len(self.candidates), MAX_PAIRS_PER_STEP)

    @property
    def cost(self) -> int:
        """Number of candidates."""
        return len(self.candidates)

    @property
    def early_cost(self) -> float:
        """Number of candidates before the last."""
        return self.cost - 1

    @property
    def admission_class(self) -> AdmissionClass:
        return AdmissionClass.BULK_MATCH if self.is_bulk else AdmissionClass.MATCH

    @property
    def required(self) -> frozenset[EmbeddingKind]:
        """The embeddings held of every image; `CandidateScores` holds features of some that are ranked."""
        return required_to_match(Mode.ITC if self.ranks_images else self.mode)


def required_to_generate(*, is_question_conditioned: bool) -> frozenset[EmbeddingKind]:
    """Return what generation starts from; an output that depends on the question cannot be cached."""
    kind = EmbeddingKind.IMAGE_FEATURES if is_question_conditioned else EmbeddingKind.QUERY_OUTPUT
    return frozenset({kind})


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
    caller: who sent it; "" where callers cannot be told apart. holds_rows: whether one of its sequences has
    entered the decoder. request_ids: for log lines; one where a caller sent it.
    """

    inputs: GenerateInput | MatchInput
    deadline: float | None = None
    num_items: int = 1
    caller: str = ""
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

    def start_work(self) -> None:
        """Note that the device begins with it now: its time in the queue ends."""
        if self.work_started is None:
            self.work_started = time.monotonic()

    @property
    def times(self) -> DeviceTimes:
        """The times so far."""
        now = time.monotonic()
        started = self.work_started or now
        passes = self._passes()
        early_s = sum(batch.vision_s + batch.qformer_s for batch in passes if batch.started < started)
        vision_s = sum(batch.vision_s for batch in passes)
        qformer_s = sum(batch.qformer_s for batch in passes)
        return DeviceTimes(
            queue_s=max(0.0, started - self.submitted - early_s),
            vision_s=vision_s,
            qformer_s=qformer_s,
            work_s=max(0.0, now - started - (vision_s + qformer_s - early_s)),
        )

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
        # Until this call the event loop may cancel it; engine and watchdog may both try to complete it.
        with self._claim_lock:
            is_free = not (self.future.done() or self.future.running())
            return is_free and self.future.set_running_or_notify_cancel()

    def _passes(self) -> set[EncodeBatch]:
        """Return the passes over its images since it was admitted: earlier ones did not cost it time."""
        since = self.admitted or self.submitted
        return {batch for image in self.images for batch in image.batches if batch.started >= since}

    def _build_answer(self, value: T) -> Answer[T]:
        return Answer(
            value=value,
            times=self.times,
            image_cached=self.image_cached,
            max_rows=max([self.max_rows, *(batch.num_images for batch in self._passes())]),
            computed=tuple(computed for image in self.images for computed in image.drain_computed()),
        )


AnyRequest = Request[Any]
