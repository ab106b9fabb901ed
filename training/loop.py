"""The one training loop: a step function, resumable after any kill.

All randomness of a step comes from `(seed, step)`. A run that was killed and resumed from its last checkpoint
therefore takes exactly the steps of an uninterrupted run.

Under torchrun each process draws its own batch from `(seed, step, rank)`, and all apply the mean of their
gradients. They share one output directory, which only the main process writes to.
"""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from tqdm import tqdm

from training.checkpoint import CheckpointMismatchError, load_checkpoint, save_best, save_checkpoint
from training.config import Optimization
from training.evaluation_history import Evaluation, EvaluationHistory
from training.gradients import average_gradients
from training.metrics_log import MetricsLog
from training.optimizers import build_optimizer, learning_rate_at

LOG_EVERY = 20
_CURE = "lower the learning rate and start the phase anew"

Losses = dict[str, Tensor]
Step = Callable[[int, np.random.Generator], Losses]
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

    def autocast(self) -> torch.autocast | nullcontext[None]:
        """Return the context in which the model runs."""
        return torch.autocast(self.device.type, self.autocast_dtype) if self.autocast_dtype else nullcontext()


class NonFiniteLossError(Exception):
    """A loss or gradient is NaN or infinite; the message names the step and the figures."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


def train(
    run: Run,
    model: nn.Module,
    step: Step,
    optimization: Optimization,
    *,
    evaluation: Evaluation | None = None,
    gather: GatherSteps = gather_object,
) -> None:
    """Run `step` until the trainable parameters of `model` have had `optimization.steps` updates.

    `step(index, rng)` returns its losses by name; `loss` is minimised. Checkpoints, `metrics.jsonl`,
    TensorBoard events and `curves.png` go to `run.directory`; the figures of an evaluation to `validation` in
    it, and the best checkpoint beside the last. Raises NonFiniteLossError, and CheckpointMismatchError if
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
    with ExitStack() as stack:
        recorder = None
        if processes.is_main_process:
            recorder = _Recorder(run, model, optimizer, optimization.steps, start, evaluation, stack)
        for index in range(start, optimization.steps):
            if _is_ended(recorder):
                break
            losses = _update(run, optimizer, step, optimization, index)
            if recorder is not None:
                recorder.record(index + 1, losses)
    processes.wait_for_everyone()


class _Recorder:
    """Records the steps of a run, in its main process: logs, evaluates and saves checkpoints."""

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        num_steps: int,
        start: int,
        evaluation: Evaluation | None,
        stack: ExitStack,
    ) -> None:
        self._run, self._model, self._optimizer, self._num_steps = run, model, optimizer, num_steps
        self._log = stack.enter_context(MetricsLog(run.directory, run.name, start))
        self._history = None
        if evaluation is not None:
            log = stack.enter_context(
                MetricsLog(run.directory / "validation", f"{run.name} validation", start)
            )
            self._history = EvaluationHistory(evaluation, log)
        stack.callback(self._log.plot)
        self._progress = stack.enter_context(
            tqdm(desc=run.name, initial=start, total=num_steps, mininterval=5)
        )

    @property
    def is_ended(self) -> bool:
        return self._history is not None and self._history.is_ended

    def record(self, num_updates: int, losses: Losses) -> None:
        """Log a step, evaluate and save where it is time to."""
        is_last = num_updates == self._num_steps
        self._progress.update()
        if num_updates % LOG_EVERY == 0 or is_last:
            figures = {name: float(value) for name, value in losses.items()}
            self._log.append(num_updates, figures)
            postfix = {name: f"{value:.3f}" for name, value in figures.items()}
            self._progress.set_postfix(postfix, refresh=False)
        # Before the checkpoint: a run that is resumed from it has been evaluated there.
        history = self._history
        if history and (history.is_due(num_updates) or is_last) and history.evaluate(num_updates):
            save_best(self._run.directory, self._model)
        if num_updates % self._run.save_every == 0 or is_last or self.is_ended:
            save_checkpoint(self._run.directory, self._model, self._optimizer, num_updates)


def _is_ended(recorder: _Recorder | None) -> bool:
    """Return whether an evaluation has ended the run; the main process knows, and says so to the others."""
    ended = [recorder is not None and recorder.is_ended]
    if PartialState().num_processes > 1:
        broadcast_object_list(ended)
    return ended[0]


def _update(
    run: Run, optimizer: torch.optim.Optimizer, step: Step, optimization: Optimization, index: int
) -> Losses:
    rng = _seed_step(run.seed, index)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(index, optimization)
    with run.autocast():
        losses = step(index, rng)
    if not torch.isfinite(losses["loss"]):
        figures = ", ".join(f"{name}={value.item():.4g}" for name, value in losses.items())
        raise NonFiniteLossError(f"{run.name}: step {index} gave {figures}; {_CURE}", index)
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(losses["loss"])
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    if PartialState().num_processes > 1:
        average_gradients(trainable)
    norm = nn.utils.clip_grad_norm_(trainable, optimization.max_grad_norm)
    if not torch.isfinite(norm):  # checked before the update and before the next checkpoint
        raise NonFiniteLossError(
            f"{run.name}: step {index} gave a gradient of norm {norm:.4g}; {_CURE}", index
        )
    optimizer.step()
    return {name: value.detach() for name, value in losses.items()}


def _seed_step(seed: int, index: int) -> np.random.Generator:
    """Seed torch for dropout and sampled negatives, and return the generator that draws the batch."""
    processes = PartialState()
    rank = processes.process_index
    torch.manual_seed(seed * 1_000_003 + index + (rank << 40))
    return np.random.default_rng([seed, index, rank] if processes.num_processes > 1 else [seed, index])
