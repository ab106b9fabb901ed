"""The checkpoint of a phase: trainable parameters, optimizer state and the number of updates."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CHECKPOINT_FILE = "checkpoint.pt"
BEST_FILE = "best.pt"


class CheckpointMismatchError(Exception):
    """A checkpoint is damaged or does not fit the model, or the processes of one run loaded unequal ones."""


def save_checkpoint(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Save the trainable parameters and the optimizer state after `step` updates."""
    state = {"step": step, "model": _trainable_state(model), "optimizer": optimizer.state_dict()}
    _write(state, directory / CHECKPOINT_FILE)


def save_best(directory: Path, model: nn.Module) -> None:
    """Save the trainable parameters as the best of the run so far."""
    _write({"model": _trainable_state(model)}, directory / BEST_FILE)


def load_best(directory: Path, model: nn.Module) -> None:
    """Load the best parameters of a run into the model. Raises as `load_checkpoint`."""
    path = directory / BEST_FILE
    _load_parameters(path, _load(path, ("model",))["model"], model)


def load_checkpoint(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the last checkpoint into model and optimizer, and return its number of updates; 0 without one.

    Raises CheckpointMismatchError naming the parameters that only one of checkpoint and model has, or whose
    shapes differ; the model is unchanged then.
    """
    path = directory / CHECKPOINT_FILE
    if not path.exists():
        return 0
    state = _load(path, ("step", "model", "optimizer"))
    _load_parameters(path, state["model"], model)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _write(state: Mapping[str, Any], path: Path) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)  # atomic: a kill leaves the former file or the new one


def _load(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what torch raises at damaged bytes shares no base
        raise CheckpointMismatchError(
            f"cannot read {path} ({type(error).__name__}: {str(error)[:200]}); if it is damaged, delete it "
            "to begin the phase again"
        ) from error
    if not isinstance(state, dict) or not set(keys) <= state.keys():
        raise CheckpointMismatchError(
            f"{path} is no checkpoint of a phase: delete it to begin the phase again"
        )
    return state


def _trainable_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _load_parameters(path: Path, saved: Mapping[str, Tensor], model: nn.Module) -> None:
    trainable = _trainable_state(model)
    _check_parameters(path, saved, trainable)
    for name, value in saved.items():
        trainable[name].copy_(value)


def _check_parameters(path: Path, saved: Mapping[str, Tensor], trainable: Mapping[str, Tensor]) -> None:
    problems = {
        "the checkpoint lacks": sorted(trainable.keys() - saved.keys()),
        "the model lacks": sorted(saved.keys() - trainable.keys()),
        "shapes differ of": sorted(
            f"{name} {list(saved[name].shape)} and {list(trainable[name].shape)}"
            for name in saved.keys() & trainable.keys()
            if saved[name].shape != trainable[name].shape
        ),
    }
    found = "; ".join(f"{problem} {', '.join(names)}" for problem, names in problems.items() if names)
    if found:
        raise CheckpointMismatchError(
            f"{path} does not fit the model: {found}; "
            "resume with the code that began the phase, or delete the phase's directory"
        )
