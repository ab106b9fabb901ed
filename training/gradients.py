"""Gradient averaging over the processes of a run, with one all-reduce per bucket of parameters."""

from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20  # as in DistributedDataParallel: large enough to hide the latency of a call

AllReduceMean = Callable[[Tensor], Tensor]  # the elementwise mean over all processes


def all_reduce_mean(values: Tensor) -> Tensor:
    """Compute the elementwise mean of a tensor over all processes."""
    mean: Tensor = reduce(values, "mean")
    return mean


def average_gradients(
    parameters: Sequence[nn.Parameter],
    *,
    bucket_bytes: int = BUCKET_BYTES,
    all_reduce: AllReduceMean = all_reduce_mean,
) -> None:
    """Replace each gradient by its mean over all processes, of which each must pass the same parameters.

    A parameter without a gradient counts as zero where another process has one, and else stays without.
    """
    for bucket in build_buckets(parameters, bucket_bytes):
        _average_bucket(bucket, all_reduce)


def build_buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Group parameters of one dtype and device, in their order, into buckets of at most `bucket_bytes`.

    A larger parameter has a bucket of its own. The grouping ignores gradients: it is equal in all processes.
    """
    groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for group in groups.values():
        bucket: list[nn.Parameter] = []
        size = 0
        for parameter in group:
            if bucket and size + parameter.nbytes > bucket_bytes:
                yield bucket
                bucket, size = [], 0
            bucket.append(parameter)
            size += parameter.nbytes
        yield bucket


def _average_bucket(bucket: Sequence[nn.Parameter], all_reduce: AllReduceMean) -> None:
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
    has_gradient = bucket[0].new_tensor([float(p.grad is not None) for p in bucket])
    means = all_reduce(torch.cat([*(gradient.flatten() for gradient in gradients), has_gradient]))
    *values, any_gradient = torch.split(means, [*(p.numel() for p in bucket), len(bucket)])
    for parameter, gradient, mean, is_present in zip(  # one GPU→CPU sync per bucket
        bucket, gradients, values, any_gradient.tolist(), strict=True
    ):
        if is_present:
            parameter.grad = gradient.copy_(mean.view_as(gradient))
