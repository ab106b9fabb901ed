"""The images that the running jobs have in flight, each once, whoever brought it."""

from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakValueDictionary

from torch import Tensor

from service.engine.request import FreshEncoding, ImageInput, Kind, Tower
from service.model_backend import Backend


class EncodingMemory(Protocol):
    """The in-process cache, as the engine sees it; its tensors lie on the CPU and are never written to."""

    def get(self, digest: str, kind: Kind) -> Tensor | None: ...

    def put(self, digest: str, kind: Kind, tensor: Tensor) -> None: ...


@dataclass(slots=True, eq=False)
class EncodeBatch:
    """One pass over several images: when it began, on the monotonic clock, and what it took."""

    started: float
    num_images: int
    vision_s: float = 0.0
    qformer_s: float = 0.0


@dataclass(slots=True, eq=False, weakref_slot=True)
class ImageSlot:
    """An image on the device, shared by all running jobs that brought it."""

    digest: str
    tower: Tower
    pixel_values: Tensor | None = None
    needs: set[Kind] = field(default_factory=set)
    have: dict[Kind, Tensor] = field(default_factory=dict)
    fresh: list[FreshEncoding] = field(default_factory=list)
    batches: list[EncodeBatch] = field(default_factory=list)
    error: Exception | None = None

    @property
    def missing(self) -> set[Kind]:
        return self.needs - self.have.keys()

    @property
    def wanted(self) -> bool:
        """Whether it is still to be encoded."""
        return self.error is None and bool(self.missing)

    def holds(self, needs: frozenset[Kind]) -> bool:
        return needs <= self.have.keys()

    def needs_vision(self, needs: frozenset[Kind]) -> bool:
        """Whether the vision tower must run before a job with these needs can go on."""
        return not self.holds(needs) and Kind.IMAGE_FEATURES not in self.have

    def take_fresh(self) -> list[FreshEncoding]:
        """Gives what was computed since the last call, so that it is written to Redis once."""
        fresh, self.fresh = self.fresh, []
        return fresh


class Images:
    """Where equal images meet: a slot lives as long as a running job holds it."""

    def __init__(self, backend: Backend, memory: EncodingMemory) -> None:
        self._backend = backend
        self._memory = memory
        self._slots: WeakValueDictionary[str, ImageSlot] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._slots)

    def keep(self, digest: str, kind: Kind, tensor: Tensor) -> None:
        """Puts into memory what was computed."""
        self._memory.put(digest, kind, tensor)

    def open_slot(self, image: ImageInput, needs: frozenset[Kind]) -> ImageSlot:
        """Gives the slot of this image, with all that is known of it already in place."""
        slot = self._slots.get(image.digest)
        if slot is None or slot.error is not None:
            slot = self._slots[image.digest] = ImageSlot(image.digest, image.tower)
        slot.needs |= needs
        if slot.pixel_values is None:
            slot.pixel_values = image.pixel_values
        for kind in slot.missing:
            # Once more from memory: it may have been computed since the event loop looked.
            known = image.encodings.get(kind)
            if known is None:
                known = self._memory.get(image.digest, kind)
            if known is not None:
                slot.have[kind] = self._backend.to_device(known)
        features = image.encodings.get(Kind.IMAGE_FEATURES)
        if slot.missing and features is not None:
            slot.have[Kind.IMAGE_FEATURES] = self._backend.to_device(features)
        return slot
