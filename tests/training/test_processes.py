"""Two processes of one run, started by torchrun on this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from model import Blip2
from tests.training import test_loop
from tests.training.miniature import miniature_config
from training.loop import Losses, Run, train
from training.tiny.recipe import TinyRecipe

NUM_PROCESSES = 2
PLAN = replace(test_loop.PLAN, steps=8, warmup_steps=2)
Split = Callable[[np.random.Generator], list[np.random.Generator]]
SCRIPT = f"""
import sys, torch
from pathlib import Path
from accelerate import PartialState
from tests.training.test_processes import fit_line
processes = PartialState(cpu=True)
assert processes.num_processes == {NUM_PROCESSES}
rank = processes.process_index
torch.save(fit_line(Path(sys.argv[1]), lambda rng: [rng]), f"{{sys.argv[1]}}/weight-{{rank}}.pt")
processes.destroy_process_group()
"""


def fit_line(directory: Path, split: Split) -> Tensor:
    """Fit the linear model to points from each of the generators that `split` derives from a step's."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss_of(rng: np.random.Generator) -> Tensor:
        inputs = torch.from_numpy(rng.normal(size=(PLAN.batch_size, 3))).float()
        errors: Tensor = model(inputs) - inputs.sum(dim=1, keepdim=True)
        return errors.pow(2).mean()

    def step(_: int, rng: np.random.Generator) -> Losses:
        return {"loss": torch.stack([loss_of(each) for each in split(rng)]).mean()}

    train(Run("line", directory, 1, torch.device("cpu"), None, save_every=4), model, step, PLAN)
    return model.weight.detach().clone()


def torchrun(*arguments: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={NUM_PROCESSES}", *arguments),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_processes_update_by_the_mean_of_their_gradients(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun(str(tmp_path / "script.py"), str(tmp_path))
    weights = [torch.load(tmp_path / f"weight-{rank}.pt") for rank in range(NUM_PROCESSES)]
    assert torch.equal(*weights)

    index = -1

    def of_all_processes(_: np.random.Generator) -> list[np.random.Generator]:
        nonlocal index
        index += 1
        return [np.random.default_rng([1, index, rank]) for rank in range(NUM_PROCESSES)]

    torch.testing.assert_close(fit_line(tmp_path / "alone", of_all_processes), weights[0])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [PLAN.steps]  # written once


@pytest.mark.slow
def test_two_processes_go_through_the_whole_recipe(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(asdict(miniature_config(steps=2))))
    out = tmp_path / "run"
    torchrun("-m", "training", "tiny", f"--config={config}", f"--out={out}", "--device=cpu")
    assert {path.name for path in (out / "model").iterdir()} == set(TinyRecipe.PHASES)
    for phase in ("stage2", "stage2_t5"):
        assert Blip2.from_pretrained(str(out / "model" / phase)).language_model is not None
