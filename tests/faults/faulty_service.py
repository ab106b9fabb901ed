"""`python -m tests.faults.faulty_service`: the real service and model on a device that fails when told to.

A request tells it by its `temperature`, which without sampling has no other effect. The test tells it by
files in the directory `FAULT_DIRECTORY`: while `hold` exists the device does nothing; `memory_rows` holds the
number of images or beams beyond which it runs out of memory.
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
from service.model_backend import Backend, Blip2Backend, EncoderId, StepDecoder
from service.runtime.lifecycle import FatalError
from service.runtime.listener import open_listener
from service.runtime.loading import load_backend
from service.runtime.settings import load_settings
from service.server import serve

RAISE: Final = 91.0  # the request fails whatever it shares the device with
LOSE: Final = 92.0  # the device's context is lost, which ends the engine's thread
HOLD, MEMORY_ROWS = "hold", "memory_rows"  # files
HANG: Final = 93.0  # the device never comes back


class FaultyDecoder:
    """A decoder that looks at its requests before it steps."""

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
        orders = {job.params.temperature for job in self._jobs}
        if LOSE in orders:
            raise torch.AcceleratorError("the device is lost, as was asked for")
        if HANG in orders:
            threading.Event().wait()
        if RAISE in orders:
            raise RuntimeError("this request fails, as was asked for")
        self._device.compute(sum(job.params.num_rows for job in self._jobs))
        done = self._decoder.step()
        for job, _ in done:
            self._jobs.remove(job)
        return done


class FaultyDevice:
    """Waits while it is held, and has memory for so many rows."""

    def __init__(self, directory: Path) -> None:
        self._hold = directory / HOLD
        self._memory_rows = directory / MEMORY_ROWS

    def compute(self, num_rows: int) -> None:
        while self._hold.exists():
            time.sleep(0.01)  # a file has no event
        if self._memory_rows.exists() and num_rows > int(self._memory_rows.read_text()):
            raise torch.OutOfMemoryError(f"no memory for {num_rows} rows, as was asked for")


class FaultyBackend:
    """A backend whose images and texts are computed on a faulty device."""

    def __init__(self, backend: Blip2Backend) -> None:
        self._backend = backend
        self._device = FaultyDevice(Path(os.environ["FAULT_DIRECTORY"]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def build_decoder(self) -> StepDecoder:
        return FaultyDecoder(self._backend.build_decoder(), self._device)

    def encode_images(self, pixel_values: Tensor, encoder: EncoderId) -> Tensor:
        self._device.compute(len(pixel_values))
        return self._backend.encode_images(pixel_values, encoder)


def main() -> int:
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


if __name__ == "__main__":
    sys.exit(main())
