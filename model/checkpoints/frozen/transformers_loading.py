"""Loading by transformers, without its warnings and with our errors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.utils import logging

from model.checkpoints.foreign_tensors import check_unquantised
from model.errors import CheckpointError

C = TypeVar("C")
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
    """Build a transformers configuration. Raises CheckpointError for another model or quantised weights."""
    expected = getattr(config_class, "model_type", None)
    if (found := fields.get("model_type")) != expected:
        raise CheckpointError(f"{path} is of model type {found!r}, {expected!r} is needed here")
    check_unquantised(fields, path)
    try:
        return config_class.from_dict(dict(fields))  # type: ignore[attr-defined]
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"{path} is not a valid configuration ({error})") from error


def freeze(module: M) -> M:
    """Set a module to evaluation mode, without gradients of its weights."""
    return module.requires_grad_(False).eval()
