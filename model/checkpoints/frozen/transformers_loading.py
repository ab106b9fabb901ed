"""Loading by transformers, without its warnings and with our errors."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.utils import logging

from model.checkpoints.foreign_tensors import check_unquantised
from model.checkpoints.strict_loading import BUILD_ERRORS
from model.config import MAX_LAYERS
from model.errors import CheckpointError

C = TypeVar("C")
_BOUNDS = (  # of fields by these names, in all classes
    (re.compile(r"(num|n)_(\w+_)?layers?"), 0, MAX_LAYERS),
    (re.compile(r"(num|n)_(\w+_)?heads?"), 1, 1 << 16),
    (re.compile(r"(\w+_)?p?drop(out)?(_rate|_prob)?"), 0, 1),
)
M = TypeVar("M", bound=nn.Module)


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Silence warnings and progress bars of transformers, which our errors replace, inside the block."""
    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()


def build_config(config_class: type[C], path: Path, fields: Mapping[str, Any]) -> C:
    """Build a transformers configuration.

    Raises CheckpointError for another model, quantised weights, more than MAX_LAYERS layers, and fields that
    no model can have.
    """
    expected = getattr(config_class, "model_type", None)
    if (found := fields.get("model_type")) != expected:
        raise CheckpointError(f"{path} is of model type {found!r}, {expected!r} is needed here")
    check_unquantised(fields, path)
    _check_numbers(fields, path)
    try:
        return config_class.from_dict(dict(fields))  # type: ignore[attr-defined]
    except (*BUILD_ERRORS, StrictDataclassError) as error:
        raise CheckpointError(f"{path} is not a valid configuration ({error})") from error


def _check_numbers(fields: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError for numbers that the classes do not check, and fail with when they run.

    For too many layers some of them make lists that fill the memory.
    """
    for name, value in fields.items():
        if isinstance(value, Mapping):
            _check_numbers(value, path)
        for pattern, least, most in _BOUNDS:
            is_number = pattern.fullmatch(name) and isinstance(value, int | float)
            if is_number and not least <= value <= most:
                raise CheckpointError(
                    f"{path} sets {name!r} to {value}, it must be from {least} to {most}; use the "
                    "config.json that was saved with these weights"
                )


def freeze(module: M) -> M:
    """Set a module to evaluation mode, without gradients of its weights."""
    return module.requires_grad_(False).eval()
