from pathlib import Path

import pytest
import torch
from torch import nn

from tests.training.test_loop import PLAN
from training.checkpoint import CheckpointMismatchError, load_checkpoint, save_checkpoint
from training.optimizers import build_optimizer


def build_model(**sizes: int) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(3, size) for name, size in sizes.items()})


def save(directory: Path, model: nn.Module) -> None:
    save_checkpoint(directory, model, build_optimizer(model, PLAN), step=7)


def load(directory: Path, model: nn.Module) -> int:
    return load_checkpoint(directory, model, build_optimizer(model, PLAN))


def test_weights_optimizer_state_and_step_are_restored(tmp_path: Path) -> None:
    model = build_model(first=2)
    optimizer = build_optimizer(model, PLAN)
    torch.autograd.backward(model["first"](torch.ones(1, 3)).sum())
    optimizer.step()
    save_checkpoint(tmp_path, model, optimizer, step=7)
    restored = build_model(first=2)
    restored_optimizer = build_optimizer(restored, PLAN)
    assert load_checkpoint(tmp_path, restored, restored_optimizer) == 7
    weights, expected = restored.state_dict(), model.state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert restored_optimizer.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


def test_without_a_checkpoint_no_step_has_been_taken(tmp_path: Path) -> None:
    assert load(tmp_path, build_model(first=2)) == 0


@pytest.mark.parametrize("num_bytes", [0, 1, 100, 700])
def test_a_checkpoint_that_was_cut_is_named(num_bytes: int, tmp_path: Path) -> None:
    save(tmp_path, build_model(first=2))
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(CheckpointMismatchError, match=rf"cannot read {path} .*delete it"):
        load(tmp_path, build_model(first=2))


@pytest.mark.parametrize("content", [[1], {"step": 1}])
def test_a_file_of_something_else_is_no_checkpoint(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(
        CheckpointMismatchError, match=r"checkpoint\.pt is no checkpoint of a phase: delete it"
    ):
        load(tmp_path, build_model(first=2))


def test_a_parameter_that_the_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    save(tmp_path, build_model(first=2))
    model = build_model(first=2, second=1)
    with pytest.raises(CheckpointMismatchError, match=r"checkpoint lacks second\.bias, second\.weight;"):
        load(tmp_path, model)


def test_a_parameter_that_the_model_lacks_is_named(tmp_path: Path) -> None:
    save(tmp_path, build_model(first=2, second=1))
    with pytest.raises(CheckpointMismatchError, match=r"model lacks second\.bias, second\.weight;"):
        load(tmp_path, build_model(first=2))


def test_a_renamed_parameter_is_named_on_both_sides_and_the_model_is_unchanged(tmp_path: Path) -> None:
    save(tmp_path, build_model(first=2, former=1))
    model = build_model(first=2, renamed=1)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(
        CheckpointMismatchError, match=r"lacks renamed\.bias, .*the model lacks former\.bias, former\.weight;"
    ):
        load(tmp_path, model)
    assert not any(parameter.any() for parameter in model.parameters())


def test_a_parameter_of_another_shape_is_named_though_it_could_be_broadcast(tmp_path: Path) -> None:
    save(tmp_path, build_model(first=1))
    with pytest.raises(CheckpointMismatchError, match=r"shapes differ of first\.bias \[1\] and \[2\], first"):
        load(tmp_path, build_model(first=2))


def test_a_parameter_that_became_frozen_is_a_mismatch(tmp_path: Path) -> None:
    save(tmp_path, build_model(first=2, second=1))
    model = build_model(first=2, second=1)
    model["second"].requires_grad_(False)
    with pytest.raises(CheckpointMismatchError, match=r"model lacks second\.bias"):
        load(tmp_path, model)
