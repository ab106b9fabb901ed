"""`python -m training gate` on a run of two steps a phase."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import Blip2
from model.errors import CheckpointError
from tests.training.miniature import miniature_config
from tests.training.tiny.gates.fakes import PLAN
from training.__main__ import main
from training.tiny.gates import (
    GATES,
    Bar,
    GateMissedError,
    GateResult,
    format_result,
    load_result,
    measure,
    require,
)
from training.tiny.gates.generation import ANSWER_PARAMS, CAPTION_PARAMS, PromptedGenerator
from training.tiny.gates.plan import prepare_pixels
from training.tiny.gates.results import Measurement
from training.tiny.recipe import TinyRecipe
from training.world.scenes import Scene, iter_scenes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = TinyRecipe(miniature_config(steps=2), tmp_path_factory.mktemp("run"), torch.device("cpu"))
    recipe.run()
    return recipe.out


def gate(phase: str, out: Path, *more: str) -> int:
    numbers = ["--scenes", "6", "--probe-scenes", "20", "--device", "cpu"]
    return main(["gate", phase, "--out", str(out), *numbers, *more])


@pytest.mark.parametrize("phase", [phase for phase in GATES if phase != "stage1"])
def test_a_phase_that_learnt_nothing_misses_its_gate_after_the_figures_are_written(
    run: Path, phase: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate(phase, run) == 1
    printed = capsys.readouterr()
    assert f"missed: {phase} misses" in printed.err
    assert "MISSED" in printed.out
    result = load_result(run, phase)
    assert result is not None
    assert result.missed
    assert (result.num_scenes, result.seed) == (6, 2)


def test_stage_1_has_figures_of_all_three_tasks_and_no_bars(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate("stage1", run) == 0
    result = load_result(run, "stage1")
    assert result is not None
    assert not result.measured.bars
    tasks = ("image to text, ITC", "text to image, re-ranked", "matching", "captions by the text head")
    assert {f"{task}, held-out" for task in (*tasks, "loss per token")} <= result.measured.figures.keys()
    assert "loss per token, unseen" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_figures_and_another_seed_other_scenes(run: Path) -> None:
    found = []
    for seed in ("2", "2", "3"):
        gate("stage2", run, "--seed", seed)
        found.append(load_result(run, "stage2"))
    assert found[0] == found[1]
    assert found[0] is not None
    assert found[2] is not None
    truths = [[s.predictions[0].truth for s in f.measured.samples] for f in (found[0], found[2])]
    assert truths[0] != truths[1]


def test_a_language_model_whose_run_is_not_recorded_needs_the_length_of_a_description(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").symlink_to(run / "model")
    assert gate("language_model", tmp_path) == 1
    assert "give --queries" in capsys.readouterr().err
    assert gate("language_model", tmp_path, "--queries", "28") == 1
    assert "missed: language_model misses" in capsys.readouterr().err


@pytest.mark.parametrize("phase", ["stage2", "stage2_t5"])
def test_scenes_in_a_batch_have_the_texts_that_each_has_alone(run: Path, phase: str) -> None:
    blip2 = Blip2.from_pretrained(str(run / "model" / phase))
    assert blip2.language_model is not None

    def prefix(scenes: Sequence[Scene]) -> torch.Tensor:
        image_features = blip2.encode_images(prepare_pixels(scenes, blip2.preprocess))
        return blip2.project_queries(blip2.encode_queries(image_features))

    scenes = list(iter_scenes(5, "unseen", 20))  # more than one batch
    generator = PromptedGenerator(blip2.language_model, blip2.prompts, prefix)
    questions = [
        ["is there a red star ?"] if k % 2 else ["how many stars are there ?", "what ?"] for k in range(20)
    ]
    captions, answers = generator.caption(scenes), generator.answer(scenes, questions)
    assert [len(given) for given in answers] == [len(row) for row in questions]
    for k in (0, 17):
        alone = prefix([scenes[k]])
        assert captions[k].text == blip2.generate(alone, [""], CAPTION_PARAMS)[0][0].text
        prompt = blip2.prompts.question_prompt(questions[k][-1])
        assert answers[k][-1].text == blip2.generate(alone, [prompt], ANSWER_PARAMS)[0][0].text


def result_with(*bars: Bar) -> GateResult:
    return GateResult("stage2", 2, 12, "", Measurement({"questions": {"overall": 0.5}}, bars))


def test_a_bar_is_met_at_its_minimum_and_missed_below() -> None:
    met, missed = Bar("questions", 0.9, 0.9), Bar("captions", 0.85, 0.9)
    require(result_with(met))
    with pytest.raises(
        GateMissedError, match=r"stage2 misses 1 of 2 bars: captions is 0\.850, at least 0\.900"
    ):
        require(result_with(met, missed))
    assert "| captions | 0.850 | 0.900 | MISSED |" in format_result(result_with(met, missed))


def test_a_phase_that_is_not_finished_is_named_with_the_command_that_finishes_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist.*--only vision_model"):
        measure("vision_model", replace(PLAN, out=tmp_path))
