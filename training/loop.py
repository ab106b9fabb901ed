"""The one training loop: a step function, resumable after any kill.

All randomness of a step comes from `(seed, step)`. A run that was killed and resumed from its last checkpoint
therefore takes exactly the steps of an uninterrupted run.

Under torchrun each process draws its own batch from `(seed, step, rank)`, and all apply the mean of their
gradients. They share one output directory, which only the main process writes to.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from training.checkpoint import CheckpointMismatchError, load_checkpoint, save_checkpoint
from training.config import Optimization
from training.gradients import average_gradients
from training.metrics_log import MetricsLog
from training.optimizers import build_optimizer, learning_rate_at

LOG_EVERY = 20
_CURE = "lower the learning rate and start the phase anew"

Losses = dict[str, Tensor]
Step = Callable[[np.random.Generator], Losses]
GatherSteps = Callable[[list[int]], list[int]]  # concatenates the lists of all processes


@dataclass(frozen=True, slots=True)
class Run:
    """One phase's name, output directory, seed and compute settings."""

    name: str
    directory: Path
    seed: int
    device: torch.device
    autocast_dtype: torch.dtype | None
    save_every: int


class NonFiniteLossError(Exception):
    """A loss or gradient is NaN or infinite; the message names the step and the figures."""


def train(
    run: Run, model: nn.Module, step: Step, optimization: Optimization, *, gather: GatherSteps = gather_object
) -> None:
    """Run `step` until the trainable parameters of `model` have had `optimization.steps` updates.

    `step(rng)` returns its losses by name; `loss` is minimised. Checkpoints, `metrics.jsonl`, TensorBoard
    events and `curves.png` go to `run.directory`. Raises NonFiniteLossError, and CheckpointMismatchError if
    the checkpoint does not fit the model or the processes loaded unequal ones.
    """
    processes = PartialState()
    run.directory.mkdir(parents=True, exist_ok=True)
    optimizer = build_optimizer(model, optimization)
    start = load_checkpoint(run.directory, model, optimizer)
    starts = gather([start])  # also a barrier: all have loaded the checkpoint before the next is saved
    if len(set(starts)) > 1:
        raise CheckpointMismatchError(
            f"{run.name}: the processes found checkpoints of steps {starts}; they must share one directory: "
            "start again once its file system shows the same files to all"
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
    total = optimization.steps
    progress = tqdm(range(start, total), desc=run.name, initial=start, total=total, mininterval=5)
    with MetricsLog(run.directory, run.name, start) as log:
        for index in progress:
            losses = _update(run, optimizer, step, optimization, index)
            num_updates = index + 1
            if num_updates % LOG_EVERY == 0 or num_updates == total:
                figures = {name: float(value) for name, value in losses.items()}
                log.append(num_updates, figures)
                progress.set_postfix({name: f"{value:.3f}" for name, value in figures.items()}, refresh=False)
            if num_updates % run.save_every == 0 or num_updates == total:
                save_checkpoint(run.directory, model, optimizer, num_updates)
    log.plot()


def _update(
    run: Run, optimizer: torch.optim.Optimizer, step: Step, optimization: Optimization, index: int
) -> Losses:
    rng = _seed_step(run.seed, index)
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
    if PartialState().num_processes > 1:
        average_gradients(trainable)
    norm = nn.utils.clip_grad_norm_(trainable, optimization.max_grad_norm)
    if not torch.isfinite(norm):  # checked before the update and before the next checkpoint
        raise NonFiniteLossError(f"{run.name}: step {index} gave a gradient of norm {norm:.4g}; {_CURE}")
    optimizer.step()
    return {name: value.detach() for name, value in losses.items()}


def _seed_step(seed: int, index: int) -> np.random.Generator:
    """Seed torch for dropout and sampled negatives, and return the generator that draws the batch."""
    processes = PartialState()
    rank = processes.process_index
    torch.manual_seed(seed * 1_000_003 + index + (rank << 40))
    return np.random.default_rng([seed, index, rank] if processes.num_processes > 1 else [seed, index])
