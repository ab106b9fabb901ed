"""What crosses from the event loop to the engine and back: jobs, their tickets, their answers.

A job is immutable once it is in line; its future is completed once, and is the only way back.
"""

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Generic, TypeVar

from torch import Tensor

from model import Generation, GenerationParams
from service.errors import for_caller


class Kind(StrEnum):
    """What is known of an image, each worth keeping."""

    QUERY_OUTPUT = "query_output"  # [Q, D], of the generating Q-Former
    IMAGE_EMBEDS = "image_embeds"  # [Q, E], normalised, of the matching Q-Former
    IMAGE_FEATURES = "image_features"  # [P, V], before ln_vision; the others can be made of them


class Tower(StrEnum):
    """An image encoder: the model's, or that of a retrieval model which does not share it."""

    MAIN = "main"
    MATCHING = "matching"


class Mode(StrEnum):
    """How candidates are scored: by cosine, by the matching head, or the best of the first by the second."""

    ITC = "itc"
    ITM = "itm"
    RERANK = "rerank"


class Lane(StrEnum):
    """Who waits for whom: each lane has room of its own on the device, and none waits for the others."""

    SHORT = "short"  # texts
    LONG = "long"  # texts of many tokens, which occupy their rows for long
    MATCH = "match"


MAX_SHORT_TOKENS: Final = 32

Encodings = Mapping[Kind, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class ImageInput:
    """One image on its way to the device.

    digest: SHA-256 of the file, marked with its tower unless that is the main one: what names the image's
    encodings. pixel_values: [3, S, S]; None where `encodings`, which come from the cache, suffice without the
    vision tower. tower: which encodes it.
    """

    digest: str
    pixel_values: Tensor | None
    encodings: Encodings
    tower: Tower = Tower.MAIN


@dataclass(frozen=True, slots=True, eq=False)
class FreshEncoding:
    """An encoding that was computed for this answer and is in no cache beyond this process yet."""

    digest: str
    kind: Kind
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class DeviceTimes:
    """Where an answer's time went, in seconds: in line, in the vision tower, in the Q-Former, and in the work
    that followed (decoding or matching). Work shared with others counts in full for each."""

    queue_s: float
    vision_s: float
    qformer_s: float
    work_s: float


T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Answer(Generic[T]):
    """What a job's future gives.

    image_cached: whether the job had images, and none went through the vision tower for it.
    max_rows: the largest number of rows it shared the device with.
    """

    value: T
    times: DeviceTimes
    image_cached: bool
    max_rows: int
    fresh: tuple[FreshEncoding, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Ticket(Generic[T]):
    """A job's place in time. deadline and submitted are readings of the monotonic clock, in seconds."""

    deadline: float | None = None
    submitted: float = field(default_factory=time.monotonic)
    future: Future[Answer[T]] = field(default_factory=Future)
    _claiming: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def settled(self) -> bool:
        """Whether nobody waits any more: answered, failed, or abandoned by the caller."""
        return self.future.done()

    def expired(self, now: float) -> bool:
        return self.deadline is not None and now >= self.deadline

    def resolve(self, answer: Answer[T]) -> None:
        """Answers; does nothing where the job is settled."""
        if self._claim():
            self.future.set_result(answer)

    def fail(self, error: Exception) -> None:
        """Fails with what the caller may know of the error; does nothing where the job is settled."""
        if self._claim():
            self.future.set_exception(for_caller(error))

    def _claim(self) -> bool:
        # The caller may cancel at any moment from the event loop; past this call it no longer can. The engine
        # and who gives it up may both want the last word.
        with self._claiming:
            is_free = not (self.future.done() or self.future.running())
            return is_free and self.future.set_running_or_notify_cancel()


def generate_needs(*, shows_questions: bool) -> frozenset[Kind]:
    """Gives what generating starts from; what depends on the question cannot be kept from image to image."""
    return frozenset({Kind.IMAGE_FEATURES if shows_questions else Kind.QUERY_OUTPUT})


Generations = tuple[tuple[Generation, ...], ...]  # for each prompt, best first


@dataclass(frozen=True, slots=True, eq=False)
class GenerateJob:
    """Texts for one image, one group for each prompt.

    questions: what the Q-Former is shown beside each prompt, none where it reads the image alone.
    """

    image: ImageInput
    prompts: tuple[tuple[int, ...], ...]
    params: GenerationParams
    ticket: Ticket[Generations]
    questions: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[ImageInput, ...]:
        return (self.image,)

    @property
    def lane(self) -> Lane:
        return Lane.SHORT if self.params.max_new_tokens <= MAX_SHORT_TOKENS else Lane.LONG

    @property
    def needs(self) -> frozenset[Kind]:
        return generate_needs(shows_questions=bool(self.questions))


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


Matches = tuple[Match, ...]  # best first


@dataclass(frozen=True, slots=True, eq=False)
class MatchJob:
    """Scores of candidates against one query; texts and images in any combination, but ITM needs one of each.

    rerank_k: how many of the best by ITC are scored by ITM. top_k: how many are returned.
    """

    query: str | ImageInput
    candidates: tuple[str | ImageInput, ...]
    mode: Mode
    rerank_k: int
    top_k: int
    ticket: Ticket[Matches]

    @property
    def images(self) -> tuple[ImageInput, ...]:
        sides = (self.query, *self.candidates)
        return tuple(side for side in sides if isinstance(side, ImageInput))

    @property
    def texts(self) -> tuple[str, ...]:
        sides = (self.query, *self.candidates)
        return tuple(side for side in sides if isinstance(side, str))

    @property
    def lane(self) -> Lane:
        return Lane.MATCH

    @property
    def needs(self) -> frozenset[Kind]:
        return match_needs(self.mode)


Job = GenerateJob | MatchJob


def match_needs(mode: Mode) -> frozenset[Kind]:
    """Gives what must be known of an image that is scored in this mode."""
    if mode is Mode.ITC:
        return frozenset({Kind.IMAGE_EMBEDS})
    return frozenset({Kind.IMAGE_EMBEDS, Kind.IMAGE_FEATURES})
