"""Gate results on disk."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.tiny.gates.fakes import PLAN, MatrixScorer, Oracle, say
from training.config import ConfigError
from training.tiny.gates import GateResult, load_result, save_result
from training.tiny.gates.generation import measure_generation
from training.tiny.gates.matching import measure_scorers
from training.tiny.gates.results import Measurement, Prediction, ScenePredictions
from training.tiny.gates.stage2 import judge_stage2


def test_results_are_loaded_as_they_were_written(tmp_path: Path) -> None:
    generated = measure_generation(Oracle({"yes": say("no")}), PLAN)
    ranked = measure_scorers({"unseen": MatrixScorer(torch.eye(12), torch.eye(12).roll(1, dims=1))}, PLAN)
    measured = replace(
        judge_stage2(generated),
        rankings=ranked.rankings,
        misrankings=ranked.misrankings,
        samples=generated.samples,
    )
    written = GateResult("stage2", 2, 12, "abc", measured)
    save_result(written, tmp_path)
    assert load_result(tmp_path, "stage2") == written
    assert load_result(tmp_path, "stage1") is None


def test_damaged_results_are_named_with_their_cure(tmp_path: Path) -> None:
    (tmp_path / "stage2").mkdir()
    (tmp_path / "stage2" / "gate.json").write_text('{"phase": "stage2"}')
    with pytest.raises(ConfigError, match=r"gate\.json cannot be read .* run the gate stage2 again"):
        load_result(tmp_path, "stage2")


def test_the_file_has_the_keys_of_earlier_releases(tmp_path: Path) -> None:
    prediction = Prediction("what ?", "color", "red", "blue", is_correct=False, score=-0.5)
    measured = Measurement({}, (), samples=(ScenePredictions("unseen", 3, (prediction,)),))
    path = save_result(GateResult("stage2", 2, 12, "abc", measured), tmp_path)
    saved = json.loads(path.read_text())
    assert saved.keys() == {"phase", "seed", "num_scenes", "weights", "measured"}
    assert saved["measured"]["samples"] == [
        {
            "split": "unseen",
            "index": 3,
            "statements": [
                {
                    "question": "what ?",
                    "family": "color",
                    "said": "red",
                    "truth": "blue",
                    "right": False,
                    "score": -0.5,
                }
            ],
        }
    ]
