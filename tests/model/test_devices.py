"""Devices: what counts as out of memory, and what as lost; memory that goes back."""

import ctypes
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.devices import CPU, check_computes, is_out_of_memory, return_free_memory
from model.errors import DeviceLostError

NOT_INITIALIZED = "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"


class FailingProduct:
    """A matrix product that raises."""

    def __init__(self, error: RuntimeError) -> None:
        self._error = error

    def __call__(self, _left: Tensor, _right: Tensor) -> Tensor:
        raise self._error


def test_a_device_that_computes_passes() -> None:
    check_computes(CPU)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_device_that_only_lacks_memory_is_not_lost(error: RuntimeError) -> None:
    check_computes(CPU, FailingProduct(error))


@pytest.mark.parametrize(
    "error",
    [RuntimeError(NOT_INITIALIZED), torch.AcceleratorError("CUDA error: device-side assert triggered")],
)
def test_a_device_that_fails_at_a_small_product_is_lost(error: RuntimeError) -> None:
    with pytest.raises(DeviceLostError, match="2 x 2"):
        check_computes(CPU, FailingProduct(error))


def test_a_missing_workspace_counts_as_out_of_memory_until_the_device_is_checked() -> None:
    assert is_out_of_memory(RuntimeError(NOT_INITIALIZED))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc keeps free memory so")
def test_free_memory_between_tensors_that_live_goes_back_to_the_system() -> None:
    size, count = 2**16, 4000  # smaller than what glibc maps apart
    tensors = [torch.ones(size, dtype=torch.uint8) for _ in range(count)]
    kept = tensors[::100]
    del tensors
    before_bytes = resident_bytes()
    return_free_memory()
    assert before_bytes - resident_bytes() > size * count // 2
    assert all(tensor.all() for tensor in kept)
