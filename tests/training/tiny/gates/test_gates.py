"""Gates on models whose figures are known: an oracle meets every bar, one that knows nothing misses them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import Generation
from model.errors import CheckpointError
from training.config import ConfigError
from training.tiny.gates import (
    Bar,
    Findings,
    GateMissedError,
    Plan,
    format_findings,
    measure,
    read_findings,
    require,
    write_findings,
)
from training.tiny.gates.findings import Measured
from training.tiny.gates.language import judge_reader
from training.tiny.gates.matching import hard_negatives, judge_rankings, measure_scorers
from training.tiny.gates.probe import fit_probe
from training.tiny.gates.speaking import CAPTION, measure_speaker
from training.tiny.gates.stage2 import judge_viewer
from training.tiny.gates.vision import measure_encoder, pool_objects
from training.tiny.vision import PATCH_CLASSES, label_patches
from training.world.captions import listing_caption
from training.world.gallery import identified_scenes
from training.world.questions import FAMILIES
from training.world.scenes import Scene, SceneObject

PLAN = Plan(Path("unused"), num_scenes=12, num_probe_scenes=80)
GRID_SIDE = 8


def encode_truly(scenes: Sequence[Scene]) -> Tensor:
    """Features that spell out what each patch lies on, one-hot, behind a class token; [B, 65, 43]."""
    labels = label_patches(scenes, GRID_SIDE).patches  # [B, 64, 6]
    spelt = [
        torch.nn.functional.one_hot(labels[..., k].clamp(min=0), count)
        for k, count in enumerate(PATCH_CLASSES.values())
    ]
    patches = torch.cat(spelt, dim=-1).float()
    return torch.cat([torch.zeros(len(scenes), 1, patches.shape[-1]), patches], dim=1)


def encode_noise(scenes: Sequence[Scene]) -> Tensor:
    return torch.randn(len(scenes), 65, 43, generator=torch.Generator().manual_seed(len(scenes)))


def say(text: str, score: float = -1.0) -> Generation:
    return Generation(text, (1,), score, 1, "stop")


class Oracle:
    """Says what is true of every scene. lies: what it says in the place of some texts."""

    def __init__(self, lies: dict[str, Generation] | None = None) -> None:
        self._lies = lies or {}
        self._answers = {
            (scene, item.question): item.answer
            for split in ("unseen", "held-out")
            for scenes in [PLAN.scenes(split)]
            for scene, asked in zip(scenes, PLAN.questions(scenes), strict=True)
            for item in asked
        }

    def caption(self, scenes: Sequence[Scene]) -> list[Generation]:
        return [self._say(listing_caption(scene)) for scene in scenes]

    def answer(self, scenes: Sequence[Scene], asked: Sequence[Sequence[str]]) -> list[list[Generation]]:
        return [
            [self._say(self._answers[scene, question]) for question in row]
            for scene, row in zip(scenes, asked, strict=True)
        ]

    def _say(self, truth: str) -> Generation:
        return self._lies.get(truth, say(truth))


class MatrixScorer:
    """Scores by a given matrix, and matches what another one has above 0."""

    def __init__(self, cosines: Tensor, logits: Tensor) -> None:
        self._cosines, self._logits = cosines, logits
        self.asked: list[tuple[int, int]] = []

    def similarities(self) -> Tensor:
        return self._cosines

    def match_logits(self, images: Tensor, captions: Tensor) -> Tensor:
        self.asked += zip(images.tolist(), captions.tolist(), strict=True)
        yes = self._logits[images, captions]
        return torch.stack([-yes, yes], dim=1)


def findings(*bars: Bar) -> Findings:
    return Findings("stage2", 2, 12, "", Measured({"questions": {"overall": 0.5}}, bars))


def test_features_that_spell_everything_out_meet_every_bar_of_the_image_encoder() -> None:
    measured = measure_encoder(encode_truly, PLAN)
    assert set(measured.figures["unseen"].values()) == {1.0}
    assert set(measured.figures["held-out, the held-out object alone"].values()) == {1.0}
    assert {"unseen, 1_objects", "unseen, small", "held-out, 4_objects"} <= measured.figures.keys()
    assert len(measured.bars) == 5
    assert all(bar.met for bar in measured.bars)


def test_features_that_say_nothing_miss_the_bars_of_the_image_encoder() -> None:
    measured = measure_encoder(encode_noise, PLAN)
    assert not any(bar.met for bar in measured.bars if "size" not in bar.name)


def test_an_object_is_pooled_from_its_own_patches_alone() -> None:
    left = SceneObject("circle", "red", "small", "solid", 0.25, 0.25, 0.1)
    right = SceneObject("star", "blue", "large", "striped", 0.7, 0.7, 0.18)
    pooled = pool_objects(encode_truly, [Scene((left, right), "gray", 0)])
    spelt = torch.nn.functional.layer_norm(encode_truly([Scene((left,), "gray", 0)]), (43,))[0, 1 + 8 + 1]
    assert pooled.num_objects == [2, 2]
    assert pooled.classes[0].tolist() == [0, 0, 0, 0, 3, 3]  # red, circle, small, solid, cell 3 of 12 twice
    assert torch.allclose(pooled.features[0], spelt, atol=1e-5)


def test_a_probe_tells_apart_what_a_line_tells_apart() -> None:
    features = torch.tensor([[-2.0, 0.3], [-1.0, -0.2], [1.0, 0.1], [2.0, -0.4]])
    probe = fit_probe(features, torch.tensor([0, 0, 1, 1]), 2)
    assert probe.predict(torch.tensor([[-0.6, 0.0], [0.6, 0.0]])).tolist() == [0, 1]


@pytest.mark.parametrize("judge", [judge_reader, judge_viewer])
def test_a_speaker_that_is_always_right_meets_every_bar(judge: Callable[..., Measured]) -> None:
    measured = judge(measure_speaker(Oracle(), PLAN))
    assert all(bar.met for bar in measured.bars)
    assert set(measured.figures["questions, unseen"].values()) == {1.0}
    assert measured.figures["captions, held-out"]["wholly_true"] == 1.0
    assert not measured.mistakes
    assert all(statement.right for sample in measured.samples for statement in sample.statements)
    assert {len(sample.statements) for sample in measured.samples} == {6}  # a caption and five answers


def test_one_wrong_answer_is_counted_in_its_family_and_kept_as_a_mistake() -> None:
    spoken = measure_speaker(Oracle({"two": say("three", -0.1), "red": say("blue", -0.5)}), PLAN)
    wrong = [sample.statements[0] for sample in spoken.mistakes]
    assert {statement.said for statement in wrong} == {"three", "blue"}
    assert [statement.score for statement in wrong] == sorted((s.score for s in wrong), reverse=True)
    figures = spoken.figures["questions, unseen"]
    assert figures["count"] < 1.0
    assert figures["size"] == figures["texture"] == 1.0
    assert figures["macro"] == pytest.approx(sum(figures[family] for family in FAMILIES) / 10)


def test_a_false_caption_misses_the_bar_of_captions_only() -> None:
    first = listing_caption(PLAN.scenes("unseen")[0])
    second = listing_caption(PLAN.scenes("unseen")[1])
    spoken = measure_speaker(Oracle({first: say("a red star"), second: say("a red")}), PLAN)
    assert spoken.figures["captions, unseen"]["wholly_true"] == pytest.approx(10 / 12)
    assert [bar.name for bar in judge_reader(spoken).bars if not bar.met] == ["unseen: captions wholly true"]
    assert {sample.statements[0].family for sample in spoken.mistakes} == {CAPTION}


def test_a_scorer_that_knows_every_pair_meets_every_bar() -> None:
    scorer = MatrixScorer(torch.eye(12), 2 * torch.eye(12) - 1)
    measured = judge_rankings(measure_scorers({"unseen": scorer}, PLAN))
    assert all(bar.met for bar in measured.bars)
    assert set(measured.figures["matching, unseen"].values()) == {1.0}
    assert not measured.misrankings
    assert measured.rankings[0].best[0] == (0, 2.0)  # match logit 1 plus cosine 1


def test_re_ranking_puts_right_what_cosines_have_wrong_and_is_scored_as_logit_plus_cosine() -> None:
    shifted = torch.eye(12).roll(1, dims=1)
    measured = judge_rankings(measure_scorers({"unseen": MatrixScorer(shifted, 3 * torch.eye(12))}, PLAN))
    assert measured.figures["image to text, ITC, unseen"]["R@1"] == 0.0
    assert measured.figures["image to text, re-ranked, unseen"]["R@1"] == 1.0
    assert measured.rankings[0].best[:2] == ((0, 3.0), (1, 1.0))
    assert {bar.name for bar in measured.bars if not bar.met} == {
        "unseen: image to text, R@1 by ITC",
        "unseen: text to image, R@1 by ITC",
    }


def test_re_ranking_below_the_cosines_misses_a_bar_of_its_own() -> None:
    scorer = MatrixScorer(torch.eye(12), 3 * torch.eye(12).roll(1, dims=1))
    measured = judge_rankings(measure_scorers({"unseen": scorer}, PLAN))
    missed = {bar.name for bar in measured.bars if not bar.met}
    assert "unseen: image to text, R@1 re-ranked, not below ITC" in missed
    assert len(missed) == 4
    assert measured.figures["matching, unseen"]["true pairs"] == 0.0
    assert {ranking.rank for ranking in measured.misrankings} == {1}


def test_itm_is_asked_about_true_pairs_hard_negatives_and_the_best_of_each_query() -> None:
    size = 40
    plan = replace(PLAN, num_scenes=size)
    scorer = MatrixScorer(torch.rand(size, size, generator=torch.Generator().manual_seed(0)), torch.eye(size))
    measure_scorers({"unseen": scorer}, plan)
    assert {(k, k) for k in range(size)} <= set(scorer.asked)
    assert len(scorer.asked) == len(set(scorer.asked))
    assert size * 16 <= len(scorer.asked) <= size * 34


def test_a_hard_negative_is_never_a_caption_that_is_true() -> None:
    scenes = identified_scenes(2, "unseen", 6)
    twins = [*scenes, replace(scenes[0], noise_seed=1)]  # its caption is true of the first as well
    texts, images = hard_negatives(torch.ones(7, 7) + torch.eye(7), twins)
    assert texts[0] not in (0, 6)
    assert images[6] not in (0, 6)
    assert all(text != k for k, text in enumerate(texts.tolist()))


def test_a_bar_is_met_at_its_minimum_and_missed_below() -> None:
    met, missed = Bar("questions", 0.9, 0.9), Bar("captions", 0.85, 0.9)
    require(findings(met))
    with pytest.raises(
        GateMissedError, match=r"stage2 misses 1 of 2 bars: captions is 0\.850, at least 0\.900"
    ):
        require(findings(met, missed))
    assert "| captions | 0.850 | 0.900 | MISSED |" in format_findings(findings(met, missed))


def test_findings_are_read_as_they_were_written(tmp_path: Path) -> None:
    spoken = measure_speaker(Oracle({"yes": say("no")}), PLAN)
    ranked = measure_scorers({"unseen": MatrixScorer(torch.eye(12), torch.eye(12).roll(1, dims=1))}, PLAN)
    measured = replace(
        judge_viewer(spoken), rankings=ranked.rankings, misrankings=ranked.misrankings, samples=spoken.samples
    )
    written = Findings("stage2", 2, 12, "abc", measured)
    write_findings(written, tmp_path)
    assert read_findings(tmp_path, "stage2") == written
    assert read_findings(tmp_path, "stage1") is None


def test_damaged_findings_are_named_with_their_cure(tmp_path: Path) -> None:
    (tmp_path / "stage2").mkdir()
    (tmp_path / "stage2" / "gate.json").write_text('{"phase": "stage2"}')
    with pytest.raises(ConfigError, match=r"gate\.json cannot be read .* run the gate stage2 again"):
        read_findings(tmp_path, "stage2")


def test_a_phase_that_is_not_finished_is_named_with_the_command_that_finishes_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist.*--only vision_model"):
        measure("vision_model", replace(PLAN, out=tmp_path))
