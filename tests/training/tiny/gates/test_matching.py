"""Retrieval and matching figures of known scores."""

from dataclasses import replace

import torch

from tests.training.tiny.gates.fakes import PLAN, MatrixScorer
from training.tiny.gates.matching import hard_negatives, judge_rankings, measure_scorers
from training.world.truth import identified_scenes


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
    assert {(k, k) for k in range(size)} <= set(scorer.scored)
    assert len(scorer.scored) == len(set(scorer.scored))
    assert size * 16 <= len(scorer.scored) <= size * 34


def test_a_hard_negative_is_never_a_caption_that_is_true() -> None:
    scenes = identified_scenes(2, "unseen", 6)
    twins = [*scenes, replace(scenes[0], noise_seed=1)]  # its caption is true of the first as well
    texts, images = hard_negatives(torch.ones(7, 7) + torch.eye(7), twins)
    assert texts[0] not in (0, 6)
    assert images[6] not in (0, 6)
    assert all(text != k for k, text in enumerate(texts.tolist()))
