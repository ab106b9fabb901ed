"""Finds the device that a model runs on."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from model.errors import DeviceUnavailableError

CPU = torch.device("cpu")
# torch has a class for its own allocator on the GPU alone; pinned memory and libraries tell otherwise.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # said where there is no memory for its workspace
)


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """Gives an array as a tensor on a device. It does not wait for what the device is doing."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an operation failed because the device, or the host, had no memory for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)


def find_device(wanted: str) -> torch.device:
    """Gives the device of "auto", "cpu", "cuda", "cuda:N" or "mps"; "auto" is a GPU of CUDA, else the CPU.

    Raises DeviceUnavailableError where torch does not see it.
    """
    if wanted == "auto":
        return torch.device("cuda") if torch.cuda.is_available() else CPU
    kind, _, index = wanted.partition(":")
    if kind not in ("cpu", "cuda", "mps") or not (index.isdecimal() or wanted == kind):
        raise DeviceUnavailableError(f"the device is {wanted!r}; it must be auto, cpu, cuda, cuda:N or mps")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        raise DeviceUnavailableError(
            f"the device is {wanted!r}, and torch sees {count} CUDA devices; set it to auto"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise DeviceUnavailableError("the device is 'mps', and torch sees no such device; set it to auto")
    return torch.device(wanted)
