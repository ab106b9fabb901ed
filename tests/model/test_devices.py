"""Devices: what counts as out of memory, and what as lost."""

import pytest
import torch
from torch import Tensor

from model.devices import CPU, check_computes, is_out_of_memory
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
