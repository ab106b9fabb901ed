"""One step of the engine: one batch of one kind of work. The scheduler plans it, a runner runs it.

Of every step: items: those that fail together. size: of the batch, which `limit` bounds. is_cut: the batch
reached the limit. is_smallest: it cannot be split to take less memory.
"""

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Final

from service.engine.candidate_scores import CandidateScores, Pair
from service.engine.image_pool import EncodedImage
from service.engine.sequence import Sequence

_BATCHES_BEFORE_GROWTH: Final = 32  # full batches before a larger one is tried
_MAX_BATCHES_BEFORE_GROWTH: Final = 16384


class Workload(StrEnum):
    """The kinds of work that share the device's time."""

    IMAGES_TO_GENERATE = "images of generation requests"
    IMAGES_TO_MATCH = "images of match requests"
    MATCH = "matching"
    GENERATE = "generation"


class BatchSizeLimit:
    """How many items go to the device at once: as many as `max_seconds` and its memory allow, at least one.

    After running out of memory the limit is what is known to fit, or half. After 32 full batches it grows by
    half; each growth that fails doubles the number of batches before the next.
    """

    def __init__(self, most: int, *, max_seconds: float = math.inf) -> None:
        self._most = most
        self._max_seconds = max_seconds
        self._fits_in_time = most
        self._fits_in_memory = most  # as far as is known
        self._largest_success = 0
        self._num_successes = 0
        self._batches_before_growth = _BATCHES_BEFORE_GROWTH
        self._has_grown = False  # since memory ran out last

    @property
    def max_size(self) -> int:
        return min(self._fits_in_time, self._fits_in_memory)

    def observe_success(self, count: int, seconds: float, *, is_cut: bool) -> None:
        """Learn from a batch. is_cut: it reached the limit."""
        self._largest_success = max(self._largest_success, count)
        if seconds > self._max_seconds:
            self._fits_in_time = max(1, int(count * self._max_seconds / seconds))
        elif is_cut:
            self._fits_in_time = min(self._most, max(self._fits_in_time, count + 1))
        if is_cut and self._fits_in_memory < self._most:
            self._num_successes += 1
        if self._num_successes >= self._batches_before_growth:
            self._fits_in_memory = min(self._most, self._fits_in_memory + max(1, self._fits_in_memory // 2))
            self._num_successes = 0
            self._has_grown = True

    def observe_out_of_memory(self, count: int) -> None:
        """Learn that the device's memory does not hold a batch of this size."""
        known = self._largest_success if self._largest_success < count else 0
        self._fits_in_memory = max(known, count // 2, 1)
        self._largest_success = min(self._largest_success, self._fits_in_memory)
        if self._has_grown:
            self._batches_before_growth = min(_MAX_BATCHES_BEFORE_GROWTH, 2 * self._batches_before_growth)
        self._has_grown = False
        self._num_successes = 0


@dataclass(frozen=True, slots=True, eq=False)
class EncodeStep:
    """Encode images, all by the same encoder, into whatever is missing of them.

    scores: the match requests that hold some of them.
    """

    stage: ClassVar[str] = "vision"
    too_large: ClassVar[str] = "one more image beside what runs; try again later"

    workload: Workload
    items: SequenceOf[EncodedImage]
    limit: BatchSizeLimit
    scores: SequenceOf[CandidateScores] = ()

    @property
    def size(self) -> int:
        return len(self.items)

    @property
    def is_cut(self) -> bool:
        return self.size >= self.limit.max_size

    @property
    def is_smallest(self) -> bool:
        return self.size == 1


@dataclass(frozen=True, slots=True, eq=False)
class MatchStep:
    """Embed texts, or compare one request by cosine, or score pairs with the matching head: one of the three.

    items: the match requests that wait for it.
    """

    stage: ClassVar[str] = "match"
    too_large: ClassVar[str] = "one more text or pair beside what runs; try again later"
    workload: ClassVar[Workload] = Workload.MATCH

    items: SequenceOf[CandidateScores]
    limit: BatchSizeLimit | None = None  # none where one request is compared
    texts: SequenceOf[str] = ()
    pairs: SequenceOf[Pair] = ()

    @property
    def size(self) -> int:
        return len(self.texts) + len(self.pairs)

    @property
    def is_cut(self) -> bool:
        return self.limit is not None and self.size >= self.limit.max_size

    @property
    def is_smallest(self) -> bool:
        return self.size <= 1


@dataclass(frozen=True, slots=True, eq=False)
class DecodeStep:
    """Run one decode step over the running sequences, then prefill those that join: one token for each.

    items: all that run, those that join included. dropped: those that ran and that nobody waits for.
    """

    stage: ClassVar[str] = "decode"
    workload: ClassVar[Workload] = Workload.GENERATE

    items: SequenceOf[Sequence]
    joining: SequenceOf[Sequence]
    dropped: SequenceOf[Sequence]
    limit: BatchSizeLimit
    is_cut: bool

    @property
    def size(self) -> int:
        """Number of rows."""
        return sum(sequence.num_rows for sequence in self.items)

    @property
    def is_smallest(self) -> bool:
        return len(self.items) == 1

    @property
    def too_large(self) -> str:
        return (
            f"the KV cache of this prompt's {self.size} beams or samples; "
            "lower num_beams or max_new_tokens, or try later"
        )


Step = EncodeStep | MatchStep | DecodeStep
