"""The strict loader: a missing, unknown or differing tensor is an error that names it."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from model.errors import CheckpointError

BUILD_ERRORS = (  # of modules and configurations of transformers, for sizes or names that no model has
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


def load_strictly(
    module: nn.Module, tensors: Mapping[str, Tensor], *, source: Path, tied: Iterable[str] = ()
) -> None:
    """Replace all weights of `module`, which may be on "meta", by `tensors`.

    tied: names that may be absent because the module shares them with another; tie them afterwards.
    Raises CheckpointError naming source, tensor and cure where names, shapes or types differ.
    """
    expected = module.state_dict()
    if missing := sorted(expected.keys() - tensors.keys() - set(tied)):
        raise CheckpointError(
            f"{source} lacks the tensor {missing[0]!r} ({len(missing)} are missing in all); "
            "it was cut, or belongs to another configuration: save the checkpoint again"
        )
    if unexpected := sorted(tensors.keys() - expected.keys()):
        raise CheckpointError(
            f"{source} holds the tensor {unexpected[0]!r}, which this model has no place for "
            f"({len(unexpected)} in all); its config.json belongs to another model: use the one saved with it"
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise CheckpointError(
                f"{source}: the tensor {name!r} is of type {tensor.dtype}, {expected[name].dtype} is needed; "
                "it was damaged, or belongs to another model: save the checkpoint again"
            )
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{source}: the tensor {name!r} has shape {list(tensor.shape)}, the configuration says "
                f"{list(expected[name].shape)}; use the config.json that was saved with these weights"
            )
    module.load_state_dict(dict(tensors), strict=False, assign=True)


def check_num_parameters(module: nn.Module, num_parameters: int, *, source: Path) -> None:
    """Raise CheckpointError where a module on "meta" is much larger than its weights in the file.

    For modules that transformers fills: it allocates what the file lacks. Shared weights may count twice.
    """
    needed = sum(each.numel() for each in module.parameters())
    if needed > 2 * num_parameters:
        raise CheckpointError(
            f"{source} holds {num_parameters:,} parameters, and the model of its configuration has "
            f"{needed:,}; use the config.json that was saved with these weights"
        )


@contextmanager
def build_on_meta(source: Path) -> Iterator[None]:
    """Build modules on "meta" inside the block, so that nothing is allocated before shapes are compared.

    Raises CheckpointError where no module can have such sizes.
    """
    with report_build_errors(source), torch.device("meta"):
        yield


@contextmanager
def report_build_errors(source: Path) -> Iterator[None]:
    """Turn errors of building modules into a CheckpointError that names the file of their sizes."""
    try:
        yield
    except BUILD_ERRORS as error:
        raise CheckpointError(
            f"no model can be built for {source} ({type(error).__name__}: {error}); use the config.json that "
            "was saved with these weights"
        ) from error
