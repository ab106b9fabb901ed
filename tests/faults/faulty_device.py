"""The real service and model on a device with injected faults.

A request injects a fault by its `length_penalty`, which changes no more than scores. The test injects
faults by files in the directory `FAULT_DIRECTORY`. While `hold` exists, the device computes nothing.
`memory_rows` contains the number of images or beams above which it runs out of memory.
"""

import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor

from model import DecodeRequest, Generation
from service.blip2_backend import Blip2Backend
from service.model_backend import Backend, EncoderId, StepDecoder
from service.runtime.lifecycle import FatalError
from service.runtime.listener import open_listener
from service.runtime.loading import load_backend
from service.runtime.settings import load_settings
from service.server import serve

RAISE: Final = 4.91  # the request fails in any batch
LOSE: Final = 4.92  # the device context is lost, which ends the engine's thread
HOLD, MEMORY_ROWS = "hold", "memory_rows"  # files
HANG: Final = 4.93  # the device never returns


class FaultyDecoder:
    """A decoder that injects faults before a step."""

    def __init__(self, decoder: StepDecoder, device: "FaultyDevice") -> None:
        self._decoder = decoder
        self._device = device
        self._jobs: list[DecodeRequest] = []

    def add(self, job: DecodeRequest) -> None:
        self._jobs.append(job)
        self._decoder.add(job)

    def cancel(self, job: DecodeRequest) -> None:
        self._jobs.remove(job)
        self._decoder.cancel(job)

    def step(self) -> Sequence[tuple[DecodeRequest, tuple[Generation, ...]]]:
        length_penalties = {job.params.length_penalty for job in self._jobs}
        if LOSE in length_penalties:
            raise torch.AcceleratorError("injected fault: the device is lost")
        if HANG in length_penalties:
            threading.Event().wait()
        if RAISE in length_penalties:
            raise RuntimeError("injected fault: the request fails")
        self._device.compute(sum(job.params.num_rows for job in self._jobs))
        done = self._decoder.step()
        for job, _ in done:
            self._jobs.remove(job)
        return done


class FaultyDevice:
    """A device that waits while `hold` exists, and has memory for a number of rows."""

    def __init__(self, directory: Path) -> None:
        self._hold = directory / HOLD
        self._memory_rows = directory / MEMORY_ROWS

    def compute(self, num_rows: int) -> None:
        while self._hold.exists():
            time.sleep(0.01)  # a file has no event
        if self._memory_rows.exists() and num_rows > int(self._memory_rows.read_text()):
            raise torch.OutOfMemoryError(f"injected fault: no memory for {num_rows} rows")


class FaultyBackend:
    """A backend whose image encoder and decoder run on a faulty device."""

    def __init__(self, backend: Blip2Backend) -> None:
        self._backend = backend
        self._device = FaultyDevice(Path(os.environ["FAULT_DIRECTORY"]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def build_decoder(self) -> StepDecoder:
        return FaultyDecoder(self._backend.build_decoder(), self._device)

    def encode_images(self, pixels: Tensor, encoder: EncoderId) -> Tensor:
        self._device.compute(len(pixels))
        return self._backend.encode_images(pixels, encoder)


def serve_faulty() -> int:
    """Serve until a signal; return the exit code."""
    settings = load_settings()
    try:
        serve(
            settings,
            open_listener(settings.host, settings.port),
            lambda: cast(Backend, FaultyBackend(load_backend(settings))),
        )
    except FatalError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    return 0
