"""`python -m training gate` on a run that has hardly learnt anything, and what of gates needs a model."""

import math
from pathlib import Path

import pytest
import torch

from model import Blip2
from tests.builders import build_matcher
from tests.training.miniature import miniature_config
from training.__main__ import main
from training.tiny.gates import GATES, Plan, read_findings
from training.tiny.gates.plan import prepare_pixels
from training.tiny.gates.speaking import ANSWER_PARAMS, CAPTION_PARAMS, PromptedSpeaker
from training.tiny.gates.writing import caption_greedily, text_loss
from training.tiny.recipe import TinyTraining
from training.world.scenes import Scene, iter_scenes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    training = TinyTraining(miniature_config(steps=2), tmp_path_factory.mktemp("run"), torch.device("cpu"))
    training.run()
    return training.out


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
    findings = read_findings(run, phase)
    assert findings is not None
    assert findings.missed
    assert (findings.num_scenes, findings.seed) == (6, 2)


def test_stage_1_has_figures_of_all_three_tasks_and_no_bars(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate("stage1", run) == 0
    findings = read_findings(run, "stage1")
    assert findings is not None
    assert not findings.measured.bars
    tasks = ("image to text, ITC", "text to image, re-ranked", "matching", "captions by the text head")
    assert {f"{task}, held-out" for task in (*tasks, "loss per token")} <= findings.measured.figures.keys()
    assert "loss per token, unseen" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_figures_and_another_seed_other_scenes(run: Path) -> None:
    found = []
    for seed in ("2", "2", "3"):
        gate("stage2", run, "--seed", seed)
        found.append(read_findings(run, "stage2"))
    assert found[0] == found[1]
    assert found[0] is not None
    assert found[2] is not None
    truths = [[s.statements[0].truth for s in f.measured.samples] for f in (found[0], found[2])]
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
def test_many_scenes_side_by_side_are_told_as_each_alone_would_be(run: Path, phase: str) -> None:
    blip2 = Blip2.from_pretrained(str(run / "model" / phase))
    assert blip2.language_model is not None

    def prefix(scenes: list[Scene]) -> torch.Tensor:
        image_features = blip2.encode_images(prepare_pixels(scenes, blip2.preprocess))
        return blip2.project_queries(blip2.encode_queries(image_features))

    scenes = list(iter_scenes(5, "unseen", 20))  # more than one batch
    speaker = PromptedSpeaker(blip2.language_model, blip2.prompts, prefix)
    asked = [
        ["is there a red star ?"] if k % 2 else ["how many stars are there ?", "what ?"] for k in range(20)
    ]
    captions, answers = speaker.caption(scenes), speaker.answer(scenes, asked)
    assert [len(given) for given in answers] == [len(row) for row in asked]
    for k in (0, 17):
        alone = prefix([scenes[k]])
        assert captions[k].text == blip2.generate(alone, [""], CAPTION_PARAMS)[0][0].text
        prompt = blip2.prompts.question_prompt(asked[k][-1])
        assert answers[k][-1].text == blip2.generate(alone, [prompt], ANSWER_PARAMS)[0][0].text


def test_a_text_head_that_knows_nothing_loses_the_logarithm_of_its_vocabulary_per_token() -> None:
    matcher = build_matcher()
    assert matcher.text_head is not None
    with torch.no_grad():
        matcher.embeddings.word_embeddings.weight.zero_()
        matcher.text_head.bias.zero_()
    loss = text_loss(matcher, torch.randn(3, 17, 48), ["a red circle", "a star", "a blue star above a cross"])
    assert loss == pytest.approx(math.log(matcher.config.vocab_size), rel=1e-5)


def test_a_caption_of_the_text_head_ends_at_its_end_token_or_at_the_last_position() -> None:
    matcher = build_matcher()
    assert matcher.text_head is not None
    images = torch.randn(3, 17, 48)
    with torch.no_grad():
        matcher.text_head.bias[matcher.tokenizer.sep_token_id] = 1e4
        assert caption_greedily(matcher, images) == ["a", "a", "a"]
        matcher.text_head.bias[matcher.tokenizer.convert_tokens_to_ids("star")] = 2e4
        longest = " ".join(["a", *["star"] * (matcher.max_text_tokens - 2)])
        assert caption_greedily(matcher, images) == [longest] * 3


def test_the_default_plan_shares_no_scene_with_training_or_evaluation(tmp_path: Path) -> None:
    validation = set(Plan(tmp_path, num_scenes=50).scenes("unseen"))
    others = [
        set(iter_scenes(0, "train", 50)),
        set(iter_scenes(0, "unseen", 50)),
        set(iter_scenes(1, "unseen", 50)),
    ]
    assert all(not validation & other for other in others)
