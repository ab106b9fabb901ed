"""Turns the images of the running jobs into what those jobs need, one batch a turn, each image once."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from service.backend import Backend
from service.jobs import FreshEncoding, ImageInput, Kind, Tower

MAX_IMAGES_PER_TURN = 8  # bounds the turn, and with it the wait of those who are decoding


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
    suspect: bool = False
    error: Exception | None = None

    @property
    def missing(self) -> set[Kind]:
        return self.needs - self.have.keys()

    def holds(self, needs: frozenset[Kind]) -> bool:
        return needs <= self.have.keys()

    def needs_vision(self, needs: frozenset[Kind]) -> bool:
        """Whether the vision tower must run before a job with these needs can go on."""
        return not self.holds(needs) and Kind.IMAGE_FEATURES not in self.have

    def take_fresh(self) -> list[FreshEncoding]:
        """Gives what was computed since the last call, so that it is written to Redis once."""
        fresh, self.fresh = self.fresh, []
        return fresh


class EncodeStage:
    """rows_seen(stage, rows) is told of each batch."""

    def __init__(
        self, backend: Backend, memory: EncodingMemory, rows_seen: Callable[[str, int], None]
    ) -> None:
        self._backend = backend
        self._memory = memory
        self._rows_seen = rows_seen
        # Equal images in flight meet here: a slot lives as long as a running job holds it.
        self._slots: WeakValueDictionary[str, ImageSlot] = WeakValueDictionary()
        self._in_hand: list[ImageSlot] = []

    @property
    def num_images(self) -> int:
        return len(self._slots)

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

    def step(self, waiting: Sequence[Sequence[ImageSlot]]) -> None:
        """Encodes one batch of the slots that the waiting jobs, oldest first, still lack."""
        self._in_hand = slots = _next_batch(waiting)
        if not slots:
            return
        batch = EncodeBatch(time.monotonic(), len(slots))
        for slot in slots:
            slot.batches.append(batch)
        self._encode_features([slot for slot in slots if Kind.IMAGE_FEATURES not in slot.have], batch)
        self._encode_queries(slots, batch)
        for slot in slots:
            _let_go(slot)
        self._in_hand = []

    def isolate(self, error: Exception) -> None:
        """After a failed step: blames the only image of the batch, else has each of them tried alone."""
        if len(self._in_hand) == 1:
            self._in_hand[0].error = error
        for slot in self._in_hand:
            slot.suspect = True

    def _encode_features(self, slots: Sequence[ImageSlot], batch: EncodeBatch) -> None:
        if not slots:
            return
        pixel_values = torch.stack([_pixels_of(slot) for slot in slots])  # [B, 3, S, S]
        image_features = self._backend.encode_images(self._backend.to_device(pixel_values), slots[0].tower)
        self._backend.synchronize()  # one sync per vision batch: its time is in every answer
        batch.vision_s = time.monotonic() - batch.started
        self._rows_seen("vision", len(slots))
        for slot, features in zip(slots, image_features, strict=True):
            slot.have[Kind.IMAGE_FEATURES] = features.clone()  # a view would keep the whole batch alive
            if Kind.IMAGE_FEATURES in slot.needs:
                self._keep(slot, Kind.IMAGE_FEATURES)

    def _encode_queries(self, slots: Sequence[ImageSlot], batch: EncodeBatch) -> None:
        for kind in (Kind.QUERY_OUTPUT, Kind.IMAGE_EMBEDS):
            lacking = [slot for slot in slots if kind in slot.missing]
            if not lacking:
                continue
            image_features = torch.stack([slot.have[Kind.IMAGE_FEATURES] for slot in lacking])
            encoded = self._backend.encode_kind(kind, image_features)
            self._backend.synchronize()
            self._rows_seen("qformer", len(lacking))
            for slot, tensor in zip(lacking, encoded, strict=True):
                slot.have[kind] = tensor.clone()
                self._keep(slot, kind)
        batch.qformer_s = time.monotonic() - batch.started - batch.vision_s

    def _keep(self, slot: ImageSlot, kind: Kind) -> None:
        tensor = slot.have[kind].to("cpu")
        self._memory.put(slot.digest, kind, tensor)
        slot.fresh.append(FreshEncoding(slot.digest, kind, tensor))


def _let_go(slot: ImageSlot) -> None:
    slot.pixel_values = None
    if Kind.IMAGE_FEATURES not in slot.needs:
        del slot.have[Kind.IMAGE_FEATURES]


def _next_batch(waiting: Sequence[Sequence[ImageSlot]]) -> list[ImageSlot]:
    # One image of each job, then a second of each: a job of many images does not hold up those behind it.
    rounds = chain.from_iterable(zip_longest(*([s for s in slots if s.missing] for slots in waiting)))
    slots = list(dict.fromkeys(slot for slot in rounds if slot is not None and slot.error is None))
    if slots and slots[0].suspect:
        return slots[:1]
    usual = [slot for slot in slots if not slot.suspect and slot.tower is slots[0].tower]
    return usual[:MAX_IMAGES_PER_TURN]


def _pixels_of(slot: ImageSlot) -> Tensor:
    assert slot.pixel_values is not None, "a job brought neither pixels nor encodings"
    return slot.pixel_values
