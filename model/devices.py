"""Devices: selection, uploads, memory."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from model.errors import DeviceLostError, DeviceUnavailableError

CPU = torch.device("cpu")
_NOT_INITIALIZED = "CUBLAS_STATUS_NOT_INITIALIZED"  # no room for cuBLAS' workspace, or a lost context
# torch has an error class for its own GPU allocator alone; these are other allocators' messages.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    _NOT_INITIALIZED,
)


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device, without waiting for the device."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def return_free_memory() -> None:
    """Return what the C library's allocator holds free to the operating system; takes some 30 ms.

    Without it, small tensors that live long keep the pages around them. No effect but with glibc.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an operation failed for lack of memory, on the device or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _OUT_OF_MEMORY)


def check_computes(device: torch.device, multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> None:
    """Raise DeviceLostError unless the device multiplies two small matrices, or only lacks the memory to.

    A lost context and a lack of memory share a message. This distinguishes them once cached memory is free.
    """
    try:
        ones = torch.ones(2, 2, device=device)
        multiply(ones, ones).tolist()  # waits for the device
    except RuntimeError as exc:
        if is_out_of_memory(exc) and _NOT_INITIALIZED not in str(exc):
            return
        raise DeviceLostError(f"the device {str(device)!r} fails at a product of 2 x 2: {exc}") from exc


def find_device(name: str) -> torch.device:
    """Return the device "auto", "cpu", "cuda", "cuda:N" or "mps"; "auto" is a CUDA GPU, else the CPU.

    Raises DeviceUnavailableError where torch does not find it.
    """
    if name == "auto":
        return torch.device("cuda") if torch.cuda.is_available() else CPU
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or not (index.isdecimal() or name == kind):
        raise DeviceUnavailableError(f"the device is {name!r}; it must be auto, cpu, cuda, cuda:N or mps")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        raise DeviceUnavailableError(
            f"the device is {name!r}, and torch sees {count} CUDA devices; set it to auto"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise DeviceUnavailableError("the device is 'mps', and torch sees no such device; set it to auto")
    return torch.device(name)
