"""What the engine does in one step: one batch of one kind of work. The scheduler plans it, a runner runs it.

Of every step: items: those that fail together. size: of the batch, which `limit` bounds. is_cut: the batch
would have been larger without the limit. is_smallest: it cannot be split to take less memory.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from service.engine.batch_size_limit import BatchSizeLimit
from service.engine.candidate_scores import CandidateScores, Pair
from service.engine.image_pool import EncodedImage
from service.engine.sequence import Sequence


class Workload(StrEnum):
    """The kinds of work that share the device's time."""

    IMAGES_TO_GENERATE = "images of generation requests"
    IMAGES_TO_MATCH = "images of match requests"
    MATCH = "matching"
    GENERATE = "generation"


@dataclass(frozen=True, slots=True, eq=False)
class EncodeStep:
    """Encode images, all by the same encoder, into whatever is missing of them."""

    stage: ClassVar[str] = "vision"
    too_large: ClassVar[str] = "one more image beside what runs; try again later"

    workload: Workload
    items: Items[EncodedImage]
    limit: BatchSizeLimit

    @property
    def size(self) -> int:
        return len(self.items)

    @property
    def is_cut(self) -> bool:
        return self.size >= self.limit.limit

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

    items: Items[CandidateScores]
    limit: BatchSizeLimit | None = None  # none where one request is compared
    texts: Items[str] = ()
    pairs: Items[Pair] = ()

    @property
    def size(self) -> int:
        return len(self.texts) + len(self.pairs)

    @property
    def is_cut(self) -> bool:
        return self.limit is not None and self.size >= self.limit.limit

    @property
    def is_smallest(self) -> bool:
        return self.size <= 1


@dataclass(frozen=True, slots=True, eq=False)
class DecodeStep:
    """Prefill the sequences that join, then advance every sequence of `items` by one token.

    items: all that run, those that join included. dropped: those that ran and that nobody waits for.
    """

    stage: ClassVar[str] = "decode"
    workload: ClassVar[Workload] = Workload.GENERATE

    items: Items[Sequence]
    joining: Items[Sequence]
    dropped: Items[Sequence]
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
            f"this text's {self.size} beams or samples beside what runs; "
            "lower num_beams or max_new_tokens, or try later"
        )


Step = EncodeStep | MatchStep | DecodeStep
