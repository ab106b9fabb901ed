"""The ablation of stage 1: stage 2 from its weights and from an untrained Q-Former, with several seeds each.

Both arms have the same frozen models, steps, batches and learning rates. A seed sets the new weights and the
order of the scenes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import torch
from pydantic import TypeAdapter, ValidationError

from training.config import ConfigError
from training.evaluation.metrics import Figures
from training.provenance import record_run
from training.tiny.gates.plan import GatePlan
from training.tiny.gates.stage2 import measure_stage2
from training.tiny.recipe import TinyRecipe, build_tiny_matcher

COMPARISON_FILE = "comparison.json"
_ARMS = ("with_stage1", "without_stage1")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Results of both arms after `steps` steps of stage 2, on `num_scenes` validation scenes of each split.

    figures: of every arm and seed, and of each arm the mean and, from two seeds on, the standard deviation.
    """

    steps: int
    num_scenes: int
    figures: dict[str, Figures]


_COMPARISON = TypeAdapter(Comparison)


def compare_stage1(recipe: TinyRecipe, seeds: Sequence[int], steps: int, plan: GatePlan) -> Comparison:
    """Train and measure both arms for every seed, and write `<out>/comparison.json`.

    Resumes; a finished arm is not trained or measured again. Raises ConfigError if an arm was begun with
    another number of steps.
    """
    rows: dict[str, Figures] = {}
    for arm in _ARMS:
        arm_rows = []
        for seed in seeds:
            _train_arm(recipe, arm, seed, steps)
            arm_rows.append(_measure(f"{arm}-{seed}", plan))
            rows[f"{arm}, seed {seed}"] = arm_rows[-1]
        rows[f"{arm}, mean"] = {name: mean(row[name] for row in arm_rows) for name in arm_rows[0]}
        if len(arm_rows) > 1:
            rows[f"{arm}, deviation"] = {name: stdev(row[name] for row in arm_rows) for name in arm_rows[0]}
    comparison = Comparison(steps, plan.num_scenes, rows)
    (recipe.out / COMPARISON_FILE).write_bytes(_COMPARISON.dump_json(comparison, indent=2) + b"\n")
    return comparison


def load_comparison(out: Path) -> Comparison | None:
    """Load the comparison of a run; None if there is none. Raises ConfigError if the file is damaged."""
    path = out / COMPARISON_FILE
    if not path.exists():
        return None
    try:
        return _COMPARISON.validate_json(path.read_bytes())
    except ValidationError as exc:
        raise ConfigError(f"{path} cannot be read; compare again") from exc


def _train_arm(recipe: TinyRecipe, arm: str, seed: int, steps: int) -> None:
    config = replace(recipe.config, seed=seed, stage2=replace(recipe.config.stage2, steps=steps))
    phase = f"{arm}-{seed}"
    record_run(recipe.out / phase, config)
    if recipe.artifacts.is_finished(phase):
        return
    torch.manual_seed(seed)
    matcher = recipe.artifacts.load_stage1() if arm == "with_stage1" else build_tiny_matcher(config)
    replace(recipe, config=config).train_opt_stage2(phase, matcher)


def _measure(phase: str, plan: GatePlan) -> Figures:
    path = plan.out / phase / f"figures-{plan.seed}-{plan.num_scenes}.json"
    if path.exists():
        figures: Figures = json.loads(path.read_text(encoding="utf-8"))
        return figures
    measured = measure_stage2(phase, plan).figures
    figures = {
        f"{task}, {split}": measured[f"{task}, {split}"][name]
        for task, name in (("questions", "overall"), ("captions", "wholly_true"))
        for split in ("unseen", "held-out")
    } | {"final loss": _final_loss(plan.out / phase)}
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def _final_loss(directory: Path) -> float:
    """Compute the mean of the last ten logged losses."""
    rows = [json.loads(row) for row in (directory / "metrics.jsonl").read_text().splitlines()]
    return mean(row["loss"] for row in rows[-10:])
