"""The loop on a linear model, y = w · x, with noise from the generators of each step."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from training.checkpoint import CheckpointMismatchError, load_best
from training.config import Optimization
from training.evaluation_history import Evaluation
from training.loop import LOG_EVERY, GatherSteps, Losses, NonFiniteLossError, Run, train

PLAN = Optimization(
    steps=60,
    batch_size=4,
    learning_rate=0.05,
    min_learning_rate=0.005,
    warmup_steps=10,
    weight_decay=0.05,
    beta2=0.98,
    max_grad_norm=1.0,
)


class KilledError(Exception):
    pass


def run_in(directory: Path) -> Run:
    return Run("line", directory, seed=1, device=torch.device("cpu"), autocast_dtype=None, save_every=25)


def train_line(directory: Path, kill_at: int | None = None, gather: GatherSteps = gather_object) -> Tensor:
    """Fit the linear model; step `kill_at` raises, as a killed process writes nothing more."""
    torch.manual_seed(0)
    linear = nn.Linear(3, 1)
    model = nn.Sequential(linear, nn.Dropout(0.2))
    taken = 0

    def step(_: int, rng: np.random.Generator) -> Losses:
        nonlocal taken
        if taken == kill_at:
            raise KilledError
        taken += 1
        inputs = torch.from_numpy(rng.normal(size=(PLAN.batch_size, 3))).float()
        return {"loss": (model(inputs) - inputs.sum(dim=1, keepdim=True)).pow(2).mean()}

    train(run_in(directory), model, step, PLAN, gather=gather)
    return linear.weight.detach().clone()


def rows(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_run_killed_and_resumed_equals_the_unbroken_one(tmp_path: Path) -> None:
    unbroken = train_line(tmp_path / "unbroken")
    with pytest.raises(KilledError):
        train_line(tmp_path / "killed", kill_at=47)
    resumed = train_line(tmp_path / "killed")
    assert torch.equal(resumed, unbroken)
    assert rows(tmp_path / "killed") == rows(tmp_path / "unbroken")


def test_the_loss_falls_and_is_kept_as_rows_and_curves(tmp_path: Path) -> None:
    train_line(tmp_path)
    history = rows(tmp_path)
    assert [row["step"] for row in history] == list(range(LOG_EVERY, PLAN.steps + 1, LOG_EVERY))
    assert history[-1]["loss"] < history[0]["loss"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_finished_run_takes_no_further_step(tmp_path: Path) -> None:
    first = train_line(tmp_path)
    assert torch.equal(train_line(tmp_path, kill_at=0), first)


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_are_spoilt(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)

    def step(_: int, rng: np.random.Generator) -> Losses:
        return {"loss": (model.weight - model.weight).sum().sqrt()}  # 0, with an infinite slope

    with pytest.raises(NonFiniteLossError, match="line: step 0 gave a gradient of norm"):
        train(run_in(tmp_path), model, step, PLAN)
    assert torch.isfinite(model.weight).all()


def test_frozen_parameters_stay_bit_equal(tmp_path: Path) -> None:
    torch.manual_seed(0)
    frozen, trained = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 1)
    before = {name: value.clone() for name, value in frozen.state_dict().items()}

    def step(_: int, rng: np.random.Generator) -> Losses:
        return {"loss": trained(frozen(torch.ones(2, 3))).pow(2).mean()}

    train(run_in(tmp_path), nn.ModuleList([frozen, trained]), step, PLAN)
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)

    def step(_: int, rng: np.random.Generator) -> Losses:
        return {"loss": model.weight.sum() * float("inf")}

    with pytest.raises(NonFiniteLossError, match="line: step 0 gave loss="):
        train(run_in(tmp_path), model, step, PLAN)


def test_processes_that_see_unequal_checkpoints_do_not_begin(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatchError, match=r"checkpoints of steps \[0, 25\].*one directory"):
        train_line(tmp_path, gather=lambda steps: [*steps, 25])  # 25: of another process
    assert not (tmp_path / "metrics.jsonl").exists()


class Measured:
    """Returns given values, one an evaluation; raises as a killed process where there is none."""

    def __init__(self, *values: float) -> None:
        self._values = list(values)

    def __call__(self) -> dict[str, float]:
        if not self._values:
            raise KilledError
        return {"recall": self._values.pop(0)}


def evaluate_line(directory: Path, measure: Measured, patience: int | None = None) -> Tensor:
    torch.manual_seed(0)
    linear = nn.Linear(3, 1)

    def step(_: int, rng: np.random.Generator) -> Losses:
        inputs = torch.from_numpy(rng.normal(size=(PLAN.batch_size, 3))).float()
        return {"loss": (linear(inputs) - inputs.sum(dim=1, keepdim=True)).pow(2).mean()}

    evaluation = Evaluation(measure=measure, every=10, best_by="recall", patience=patience)
    train(run_in(directory), linear, step, PLAN, evaluation=evaluation)
    last = linear.weight.detach().clone()
    load_best(directory, linear)
    return last - linear.weight.detach()


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path: Path) -> None:
    difference = evaluate_line(tmp_path, Measured(0.1, 0.4, 0.2, 0.4, 0.3, 0.2))
    assert difference.abs().max() > 0
    assert [row["recall"] for row in rows(tmp_path / "validation")] == [0.1, 0.4, 0.2, 0.4, 0.3, 0.2]
    assert evaluate_line(tmp_path, Measured()).abs().max() > 0, "a finished run is not evaluated again"


def test_a_run_whose_last_evaluation_is_the_best_keeps_it(tmp_path: Path) -> None:
    assert evaluate_line(tmp_path, Measured(*map(float, range(6)))).abs().max() == 0


@pytest.mark.parametrize(("patience", "num_evaluations"), [(1, 3), (2, 4), (4, 6), (None, 6)])
def test_a_run_ends_when_its_patience_does(
    tmp_path: Path, patience: int | None, num_evaluations: int
) -> None:
    evaluate_line(tmp_path, Measured(0.1, 0.3, 0.2, 0.2, 0.2, 0.2), patience)
    assert rows(tmp_path / "validation")[-1]["step"] == 10 * num_evaluations


def test_an_ended_run_stays_ended(tmp_path: Path) -> None:
    evaluate_line(tmp_path, Measured(0.1, 0.3, 0.2), patience=1)
    evaluate_line(tmp_path, Measured(), patience=1)
    assert rows(tmp_path)[-1]["step"] < PLAN.steps


@pytest.mark.parametrize("kill_after", range(6))
def test_a_run_killed_while_it_is_evaluated_equals_the_unbroken_one(tmp_path: Path, kill_after: int) -> None:
    values = [0.1, 0.4, 0.2, 0.5, 0.3, 0.2]
    unbroken = evaluate_line(tmp_path / "unbroken", Measured(*values))
    with pytest.raises(KilledError):
        evaluate_line(tmp_path / "killed", Measured(*values[:kill_after]))
    num_kept = (kill_after * 10 + 9) // 25 * 25 // 10  # evaluations up to the last checkpoint
    assert torch.equal(evaluate_line(tmp_path / "killed", Measured(*values[num_kept:])), unbroken)
    assert rows(tmp_path / "killed/validation") == rows(tmp_path / "unbroken/validation")
