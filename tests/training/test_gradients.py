"""Gradient averaging with a second process that is simulated by its gradients."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from training.gradients import average_gradients, build_buckets

SIZES = ((5, 3), (7,), (), (2, 2), (11,))  # 15, 7, 1, 4, 11 numbers of 4 bytes
NUM_PARAMETERS = len(SIZES)


def build_parameters(seed: int, *, without: Iterable[int] = ()) -> list[nn.Parameter]:
    """Build parameters with random gradients; those at the indices `without` have none."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.zeros(size)) for size in SIZES]
    for index, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if index in without else gradient
    return parameters


def average(local: list[nn.Parameter], remote: list[nn.Parameter], bucket_bytes: int) -> int:
    """Average the gradients of two processes in place, as both would; return the number of all-reduces."""
    recorded: list[Tensor] = []

    def record(values: Tensor) -> Tensor:
        recorded.append(values)
        return values

    copies = [nn.Parameter(p.detach().clone()) for p in remote]
    for copy, parameter in zip(copies, remote, strict=True):
        copy.grad = None if parameter.grad is None else parameter.grad.clone()
    average_gradients(copies, bucket_bytes=bucket_bytes, all_reduce=record)
    remote_values = iter(recorded)
    average_gradients(
        local, bucket_bytes=bucket_bytes, all_reduce=lambda values: (values + next(remote_values)) / 2
    )
    assert not list(remote_values), "both processes call all-reduce equally often"
    return len(recorded)


@pytest.mark.parametrize(
    ("bucket_bytes", "num_buckets"),
    [(1, 5), (4 * 15, 3), (4 * 22, 2), (4 * 38, 1), (25 * 2**20, 1)],
)
def test_buckets_of_any_size_give_the_mean_of_each_parameter(bucket_bytes: int, num_buckets: int) -> None:
    local, remote = build_parameters(0), build_parameters(1)
    expected = [(p.grad + q.grad) / 2 for p, q in zip(local, remote, strict=True)]  # type: ignore[operator]
    assert average(local, remote, bucket_bytes) == num_buckets
    for parameter, mean in zip(local, expected, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, mean)


def test_a_parameter_without_gradients_anywhere_stays_without() -> None:
    local, remote = build_parameters(0, without=[1, 4]), build_parameters(1, without=[1, 4])
    average(local, remote, bucket_bytes=4 * 22)
    assert [p.grad is None for p in local] == [False, True, False, False, True]


def test_a_gradient_that_only_one_process_has_counts_as_zero_in_the_other() -> None:
    local, remote = build_parameters(0, without=[1]), build_parameters(1, without=[3])
    only_remote, only_local = remote[1].grad, local[3].grad
    assert only_remote is not None
    assert only_local is not None
    expected = only_remote / 2, only_local / 2
    average(local, remote, bucket_bytes=4 * 22)
    for index, mean in zip((1, 3), expected, strict=True):
        gradient = local[index].grad
        assert gradient is not None
        assert torch.equal(gradient, mean)


def test_buckets_keep_the_order_fill_up_to_their_size_and_hold_one_dtype() -> None:
    single = build_parameters(0)
    half = [nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)) for _ in range(2)]
    buckets = list(build_buckets([half[0], *single, half[1]], bucket_bytes=4 * 15))
    sizes = [[p.numel() for p in bucket] for bucket in buckets]
    assert sizes == [[3, 3], [15], [7, 1, 4], [11]]


def test_a_parameter_larger_than_a_bucket_has_one_of_its_own() -> None:
    parameters = [nn.Parameter(torch.zeros(size)) for size in (1, 100, 1)]
    buckets = list(build_buckets(parameters, bucket_bytes=4 * 10))
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[1], [100], [1]]


def test_no_parameters_need_no_all_reduce() -> None:
    assert list(build_buckets([], bucket_bytes=100)) == []
