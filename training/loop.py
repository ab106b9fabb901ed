"""The one training loop: a pure step function, resumable after any kill.

All randomness of a step comes from `(seed, step)`, so a run that was killed and resumed from its last
checkpoint takes exactly the steps the unbroken run takes.

Under torchrun each process takes a batch of its own, drawn from `(seed, step, its number)`, and all update by
the mean of their gradients. They share one output directory, which only the first writes to.
"""

import json
import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.config import Optimization
from training.curves import plot_curves
from training.schedule import learning_rate_at

LOG_EVERY = 20
_CURE = "lower the learning rate and start the phase anew"

Losses = dict[str, Tensor]
Step = Callable[[np.random.Generator], Losses]


@dataclass(frozen=True, slots=True)
class Run:
    """Where a phase keeps its files, and what it computes with."""

    name: str
    directory: Path
    seed: int
    device: torch.device
    autocast_dtype: torch.dtype | None
    save_every: int


class CheckpointMismatchError(Exception):
    """The processes of one run found unequal checkpoints; the message names their steps."""


class NonFiniteLossError(Exception):
    """A loss or gradient became NaN or infinite; the message names the step and the figures."""


def train(run: Run, model: nn.Module, step: Step, optimization: Optimization) -> None:
    """Runs `step` until the trainable parameters of `model` have had `optimization.steps` updates.

    `step(rng)` returns its losses by name, `loss` being the one to minimise. Checkpoints, `metrics.jsonl`,
    TensorBoard events and `curves.png` go to `run.directory`. Raises NonFiniteLossError, and
    CheckpointMismatchError where several processes do not see the same checkpoint.
    """
    processes = PartialState()
    run.directory.mkdir(parents=True, exist_ok=True)
    optimizer = build_optimizer(model, optimization)
    start = _load_checkpoint(run, model, optimizer)
    starts = gather_object([start])  # all have read the last checkpoint before there is another
    if len(set(starts)) > 1:
        raise CheckpointMismatchError(
            f"{run.name}: the processes found checkpoints of steps {starts}; they must see one directory: "
            "start them again once its file system shows all the same"
        )
    if processes.is_main_process:
        _train_and_record(run, model, step, optimization, optimizer, start)
    else:
        for index in range(start, optimization.steps):
            _update(run, optimizer, step, optimization, index)
    processes.wait_for_everyone()


def _train_and_record(
    run: Run,
    model: nn.Module,
    step: Step,
    optimization: Optimization,
    optimizer: torch.optim.Optimizer,
    start: int,
) -> None:
    history = _History(run.directory, start)
    bar = tqdm(
        range(start, optimization.steps),
        desc=run.name,
        initial=start,
        total=optimization.steps,
        mininterval=5,
    )
    with SummaryWriter(str(run.directory / "tensorboard"), purge_step=start + 1) as writer:
        for index in bar:
            losses = _update(run, optimizer, step, optimization, index)
            if (index + 1) % LOG_EVERY == 0 or index + 1 == optimization.steps:
                figures = {name: float(value) for name, value in losses.items()}
                history.append(index + 1, figures)
                bar.set_postfix({name: f"{value:.3f}" for name, value in figures.items()}, refresh=False)
                for name, value in figures.items():
                    writer.add_scalar(f"{run.name}/{name}", value, index + 1)
            if (index + 1) % run.save_every == 0 or index + 1 == optimization.steps:
                _save_checkpoint(run, model, optimizer, index + 1)
    plot_curves(history.rows, run.directory / "curves.png", title=run.name)


def build_optimizer(model: nn.Module, optimization: Optimization) -> torch.optim.AdamW:
    """AdamW over what is trainable; vectors, biases and scalars are exempt from weight decay."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": optimization.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optimization.learning_rate, betas=(0.9, optimization.beta2))


def _update(
    run: Run, optimizer: torch.optim.Optimizer, step: Step, optimization: Optimization, index: int
) -> Losses:
    processes = PartialState()
    rank = processes.process_index
    torch.manual_seed(run.seed * 1_000_003 + index + (rank << 40))  # dropout and sampled negatives
    rng = np.random.default_rng([run.seed, index, rank] if processes.num_processes > 1 else [run.seed, index])
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(index, optimization)
    with torch.autocast(run.device.type, run.autocast_dtype) if run.autocast_dtype else nullcontext():
        losses = step(rng)
    if not torch.isfinite(losses["loss"]):
        figures = ", ".join(f"{name}={value.item():.4g}" for name, value in losses.items())
        raise NonFiniteLossError(f"{run.name}: step {index} gave {figures}; {_CURE}")
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(losses["loss"])
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    if processes.num_processes > 1:
        for parameter in trainable:
            if parameter.grad is not None:
                parameter.grad = reduce(parameter.grad, "mean")
    norm = nn.utils.clip_grad_norm_(trainable, optimization.max_grad_norm)
    if not torch.isfinite(norm):  # before the weights and the next checkpoint are spoilt
        raise NonFiniteLossError(f"{run.name}: step {index} gave a gradient of norm {norm:.4g}; {_CURE}")
    optimizer.step()
    return {name: value.detach() for name, value in losses.items()}


def _checkpoint_path(run: Run) -> Path:
    return run.directory / "checkpoint.pt"


def _trainable_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _save_checkpoint(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    state = {"step": step, "model": _trainable_state(model), "optimizer": optimizer.state_dict()}
    partial = _checkpoint_path(run).with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(_checkpoint_path(run))  # a kill leaves the old checkpoint or the new one, never half


def _load_checkpoint(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restores the last checkpoint and returns the number of steps taken; 0 where there is none."""
    if not _checkpoint_path(run).exists():
        return 0
    state: dict[str, Any] = torch.load(_checkpoint_path(run), map_location="cpu", weights_only=True)
    parameters = dict(model.named_parameters())
    for name, value in state["model"].items():
        parameters[name].data.copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


class _History:
    """`metrics.jsonl`: one row per logged step; rows behind the checkpoint are dropped on resume."""

    def __init__(self, directory: Path, start: int) -> None:
        self._path = directory / "metrics.jsonl"
        lines: Iterable[str] = self._path.read_text().splitlines() if self._path.exists() else ()
        rows = (json.loads(line) for line in lines if line.endswith("}"))
        self.rows: list[dict[str, float]] = [row for row in rows if row["step"] <= start]
        self._path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def append(self, step: int, figures: dict[str, float]) -> None:
        self.rows.append({"step": step, **figures})
        with self._path.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
