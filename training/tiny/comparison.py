"""What stage 1 is worth: stage 2 from its weights beside stage 2 from a fresh Q-Former, several seeds each.

Both arms have the same frozen parts, steps, batches and learning rates; a seed sets the fresh weights and the
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
from training.stages.stage1 import build_matcher
from training.tiny.gates.plan import Plan
from training.tiny.gates.stage2 import measure_stage2
from training.tiny.recipe import TinyTraining

COMPARISON_FILE = "comparison.json"
_ARMS = ("with_stage1", "without_stage1")


@dataclass(frozen=True, slots=True)
class Comparison:
    """What both arms came to after `steps` steps of stage 2, on `num_scenes` validation scenes of each split.

    figures: those of every arm and seed, and of each arm the mean and, from two seeds on, the standard
    deviation.
    """

    steps: int
    num_scenes: int
    figures: dict[str, Figures]


_COMPARISON = TypeAdapter(Comparison)


def compare_stage1(training: TinyTraining, seeds: Sequence[int], steps: int, plan: Plan) -> Comparison:
    """Trains and measures both arms for every seed, and writes `<out>/comparison.json`.

    Resumes, and does nothing twice. Raises ConfigError where an arm was begun with other steps.
    """
    rows: dict[str, Figures] = {}
    for arm in _ARMS:
        of_arm = []
        for seed in seeds:
            _train_arm(training, arm, seed, steps)
            of_arm.append(_measure(f"{arm}-{seed}", plan))
            rows[f"{arm}, seed {seed}"] = of_arm[-1]
        rows[f"{arm}, mean"] = {name: mean(row[name] for row in of_arm) for name in of_arm[0]}
        if len(of_arm) > 1:
            rows[f"{arm}, deviation"] = {name: stdev(row[name] for row in of_arm) for name in of_arm[0]}
    comparison = Comparison(steps, plan.num_scenes, rows)
    (training.out / COMPARISON_FILE).write_bytes(_COMPARISON.dump_json(comparison, indent=2) + b"\n")
    return comparison


def read_comparison(out: Path) -> Comparison | None:
    """The comparison of a run, or None where none was made. Raises ConfigError where the file is damaged."""
    path = out / COMPARISON_FILE
    if not path.exists():
        return None
    try:
        return _COMPARISON.validate_json(path.read_bytes())
    except ValidationError as exc:
        raise ConfigError(f"{path} cannot be read; compare again") from exc


def _train_arm(training: TinyTraining, arm: str, seed: int, steps: int) -> None:
    config = training.config
    config = replace(config, seed=seed, stage2=replace(config.stage2, steps=steps))
    phase = f"{arm}-{seed}"
    record_run(training.out / phase, config)
    if (training.result(phase) / "config.json").exists():
        return
    torch.manual_seed(seed)
    matcher = training.load_stage1() if arm == "with_stage1" else build_matcher(config)
    replace(training, config=config).train_opt_stage2(phase, matcher)


def _measure(phase: str, plan: Plan) -> Figures:
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
    """The mean of the last ten logged losses."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return mean(row["loss"] for row in rows[-10:])
