import json
from pathlib import Path

import pytest
import torch

from tests.training.miniature import miniature_config
from training.config import ConfigError
from training.tiny.comparison import compare_stage1, load_comparison
from training.tiny.gates import GatePlan
from training.tiny.recipe import TinyRecipe


def test_both_arms_are_trained_measured_and_not_done_twice(tmp_path: Path) -> None:
    recipe = TinyRecipe(miniature_config(steps=2), tmp_path, torch.device("cpu"))
    recipe.run(["language_model", "vision_model", "stage1", "retrieval"])
    plan = GatePlan(tmp_path, num_scenes=2)
    comparison = compare_stage1(recipe, [0, 1], 2, plan)
    rows = comparison.figures
    assert [name for name in rows if "mean" in name] == ["with_stage1, mean", "without_stage1, mean"]
    losses = [rows[f"with_stage1, seed {seed}"]["final loss"] for seed in (0, 1)]
    assert rows["with_stage1, mean"]["final loss"] == pytest.approx(sum(losses) / 2)
    assert rows["with_stage1, deviation"]["final loss"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    assert losses[0] != rows["without_stage1, seed 0"]["final loss"]
    assert load_comparison(tmp_path) == comparison

    figures = tmp_path / "with_stage1-0" / "figures-2-2.json"
    figures.write_text(json.dumps({**json.loads(figures.read_text()), "final loss": 7.0}))
    assert compare_stage1(recipe, [0], 2, plan).figures["with_stage1, mean"]["final loss"] == 7.0
    with pytest.raises(ConfigError, match=r"begun with stage2\.steps=2, it is 3 now"):
        compare_stage1(recipe, [0], 3, plan)
