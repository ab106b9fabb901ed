"""Turns the images of the running jobs into what those jobs need, one batch a turn, each image once."""

import time
from collections.abc import Sequence
from itertools import chain, zip_longest

import torch
from torch import Tensor

from model.devices import is_out_of_memory
from service.engine.batch_size import BatchSize
from service.engine.engine_metrics import Meter
from service.engine.image_pool import EncodeBatch, Images, ImageSlot
from service.engine.isolation import Suspects
from service.engine.request import FreshEncoding, Kind
from service.errors import OutOfDeviceMemoryError
from service.model_backend import Backend

MAX_IMAGES_PER_TURN = 8


class EncodeStage:
    """One batch a step, of images of the jobs that wait, an equal part for each.

    Several may work on the same `images`, and learn together what `size` goes to the device at once.
    """

    name = "vision"

    def __init__(self, backend: Backend, images: Images, size: BatchSize, meter: Meter) -> None:
        self._backend = backend
        self._images = images
        self._size = size
        self._meter = meter
        self._suspects: Suspects[ImageSlot] = Suspects()
        self._waiting: list[Sequence[ImageSlot]] = []
        self._in_hand: list[ImageSlot] = []

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
        self._images.keep(slot.digest, kind, tensor)
        slot.fresh.append(FreshEncoding(slot.digest, kind, tensor))


def _let_go(slot: ImageSlot) -> None:
    slot.pixel_values = None
    if Kind.IMAGE_FEATURES not in slot.needs:
        del slot.have[Kind.IMAGE_FEATURES]


def _pixels_of(slot: ImageSlot) -> Tensor:
    assert slot.pixel_values is not None, "a job brought neither pixels nor encodings"
    return slot.pixel_values
