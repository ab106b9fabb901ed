"""Turns the images of the running jobs into what those jobs need, one batch a turn, each image once."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from model.devices import is_out_of_memory
from service.backend import Backend
from service.errors import OutOfDeviceMemoryError
from service.jobs import FreshEncoding, ImageInput, Kind, Tower
from service.stages.batch_size import TURN_S, BatchSize
from service.stages.meter import Meter
from service.stages.suspects import Suspects

MAX_IMAGES_PER_TURN = 8


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


class EncodeStage:
    """One batch a step, of images of the jobs that wait, an equal part for each."""

    def __init__(self, backend: Backend, memory: EncodingMemory, meter: Meter) -> None:
        self._backend = backend
        self._memory = memory
        self._meter = meter
        self._size = BatchSize(MAX_IMAGES_PER_TURN, turn_s=TURN_S)
        self._suspects: Suspects[ImageSlot] = Suspects()
        self._waiting: list[Sequence[ImageSlot]] = []
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

    def wait_for(self, waiting: Sequence[Sequence[ImageSlot]]) -> None:
        """Says what is to be encoded: the slots of the jobs that cannot begin yet, oldest first."""
        self._waiting = list(waiting)

    def has_work(self) -> bool:
        if any(slot.wanted for slots in self._waiting for slot in slots):
            return True
        self._suspects.clear()  # nobody waits for them any more
        return False

    def step(self) -> None:
        """Encodes one batch."""
        self._in_hand = slots = self._next_batch()
        batch = EncodeBatch(time.monotonic(), len(slots))
        for slot in slots:
            slot.batches.append(batch)
        self._encode_features([slot for slot in slots if Kind.IMAGE_FEATURES not in slot.have], batch)
        self._encode_queries(slots, batch)
        for slot in slots:
            _let_go(slot)
        was_cut = len(slots) >= self._size.limit
        self._size.went_well(len(slots), time.monotonic() - batch.started, was_cut=was_cut)
        self._waiting, self._in_hand = [], []  # or they would hold the images while nothing is to be done

    def recover(self, error: Exception) -> None:
        """After a failed step: finds the image at fault, or takes fewer at once if memory was."""
        slots, self._in_hand = self._in_hand, []
        if is_out_of_memory(error):
            self._meter.ran_out_of_memory("vision")
            self._backend.free_memory()
            self._size.ran_out(len(slots))
            if len(slots) == 1:
                slots[0].error = OutOfDeviceMemoryError(
                    "the device's memory does not hold one more image beside what runs; try again later"
                )
        elif culprit := self._suspects.accuse(slots):
            culprit.error = error

    def _next_batch(self) -> list[ImageSlot]:
        # One image of each job, then a second of each: a job of many images does not hold up those behind it.
        rounds = chain.from_iterable(
            zip_longest(*([s for s in slots if s.wanted] for slots in self._waiting))
        )
        slots = list(dict.fromkeys(slot for slot in rounds if slot is not None))
        while self._suspects:
            if group := [slot for slot in self._suspects.next_group() if slot in slots]:
                return group
        return [slot for slot in slots if slot.tower is slots[0].tower][: self._size.limit]

    def _encode_features(self, slots: Sequence[ImageSlot], batch: EncodeBatch) -> None:
        if not slots:
            return
        pixel_values = torch.stack([_pixels_of(slot) for slot in slots])  # [B, 3, S, S]
        image_features = self._backend.encode_images(self._backend.to_device(pixel_values), slots[0].tower)
        self._backend.synchronize()  # one sync per vision batch: its time is in every answer
        batch.vision_s = time.monotonic() - batch.started
        self._meter.saw_rows("vision", len(slots))
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
            self._meter.saw_rows("qformer", len(lacking))
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


def _pixels_of(slot: ImageSlot) -> Tensor:
    assert slot.pixel_values is not None, "a job brought neither pixels nor encodings"
    return slot.pixel_values
