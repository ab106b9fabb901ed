"""Retrieval figures in a gallery of scenes with distinct captions, and ITM figures on hard negatives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from training.evaluation.metrics import Figures, recall_at
from training.tiny.gates.plan import NUM_EXAMPLES, NUM_MISTAKES, GatePlan
from training.tiny.gates.results import Bar, Direction, Measurement, Ranking
from training.world.captions import listing_caption
from training.world.scenes import Scene, Split
from training.world.truth import identified_scenes, is_true_caption

RERANK_K = 16  # candidates that ITM re-ranks; a pair takes milliseconds on a CPU
_ITC_BAR = 0.88
_RERANKED_BAR = 0.95
_NUM_BEST = 5  # saved candidates of a ranking
_DIRECTIONS: tuple[Direction, ...] = ("image to text", "text to image")


class PairScorer(Protocol):
    """Scores of N images and their N captions, both given by index."""

    def similarities(self) -> Tensor:
        """Compute the [N, N] cosines of all images (rows) with all captions."""
        ...

    def match_logits(self, images: Tensor, captions: Tensor) -> Tensor:
        """Compute the [K, 2] matching logits of K pairs; index 1: match."""
        ...


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of N queries (rows) against N candidates, all [N, N].

    `itc`: cosines; `reranked`: as the service ranks, -inf for pairs without an ITM score; `is_matched`: true
    if ITM predicts a match.
    """

    itc: Tensor
    reranked: Tensor
    is_matched: Tensor

    @property
    def transposed(self) -> "Scores":
        return Scores(self.itc.T, self.reranked.T, self.is_matched.T)


def measure_scorers(scorers: Mapping[Split, PairScorer], plan: GatePlan) -> Measurement:
    """Rank the gallery of each split in both directions, and score the hard negatives by ITM."""
    recalls: dict[str, Figures] = {}
    matching: dict[str, Figures] = {}
    rankings: list[Ranking] = []
    for split, scorer in scorers.items():
        scenes = identified_scenes(plan.seed, split, plan.num_scenes)
        itc = scorer.similarities()
        negatives = hard_negatives(itc, scenes)
        by_image = score_pairs(scorer, itc, negatives)
        matching[f"matching, {split}"] = _matching_figures(by_image.is_matched, negatives)
        for direction, scores in zip(_DIRECTIONS, (by_image, by_image.transposed), strict=True):
            reranked = _rank_all(scores, split, direction)
            recalls[f"{direction}, ITC, {split}"] = _recall(_ranks_by_itc(scores.itc), scenes)
            recalls[f"{direction}, re-ranked, {split}"] = _recall([each.rank for each in reranked], scenes)
            rankings += reranked
    wrong = sorted((each for each in rankings if each.rank), key=lambda each: -each.rank)
    return Measurement(
        figures=recalls | matching,
        bars=(),
        rankings=tuple(each for each in rankings if each.query < NUM_EXAMPLES),
        misrankings=tuple(wrong[:NUM_MISTAKES]),
    )


def judge_rankings(measured: Measurement) -> Measurement:
    """Compare the figures of a model fine-tuned for retrieval with the bars."""
    bars = []
    for direction in _DIRECTIONS:
        itc, reranked = (
            measured.figures[f"{direction}, {mode}, unseen"]["R@1"] for mode in ("ITC", "re-ranked")
        )
        bars.append(Bar(f"unseen: {direction}, R@1 by ITC", itc, _ITC_BAR))
        bars.append(Bar(f"unseen: {direction}, R@1 re-ranked", reranked, _RERANKED_BAR))
        bars.append(Bar(f"unseen: {direction}, R@1 re-ranked, not below ITC", reranked, itc))
    return replace(measured, bars=tuple(bars))


def hard_negatives(itc: Tensor, scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Return the hardest negative caption of each image and image of each caption, [N] each, by ITC [N, N].

    A caption that is true of a scene is no negative for it; if all are true, the positive is returned.
    """
    captions = [listing_caption(scene) for scene in scenes]
    texts, images = [], []
    for k, (scene, caption) in enumerate(zip(scenes, captions, strict=True)):
        texts.append(next((j for j in _descending(itc[k]) if not is_true_caption(captions[j], scene)), k))
        images.append(next((i for i in _descending(itc[:, k]) if not is_true_caption(caption, scenes[i])), k))
    return torch.tensor(texts), torch.tensor(images)


def score_pairs(scorer: PairScorer, itc: Tensor, negatives: tuple[Tensor, Tensor]) -> Scores:
    """Score by ITM the positives, the hard negatives, and the best candidates of each query by ITC."""
    positive = torch.arange(len(itc))
    num_best = min(RERANK_K, len(itc))
    is_scored = torch.eye(len(itc), dtype=torch.bool)
    is_scored[positive, negatives[0]] = True
    is_scored[negatives[1], positive] = True
    is_scored.scatter_(1, itc.topk(num_best, dim=1).indices, value=True)
    is_scored.scatter_(0, itc.topk(num_best, dim=0).indices, value=True)
    images, captions = is_scored.nonzero(as_tuple=True)
    logits = scorer.match_logits(images, captions)  # [K, 2]
    reranked = torch.full_like(itc, float("-inf"))
    reranked[images, captions] = logits[:, 1] + itc[images, captions]  # as the service scores mode "rerank"
    is_matched = torch.zeros_like(is_scored)
    is_matched[images, captions] = logits[:, 1] > logits[:, 0]
    return Scores(itc, reranked, is_matched)


def _rank_all(scores: Scores, split: Split, direction: Direction) -> list[Ranking]:
    """Rank the candidates of every query: by ITC, the best of them re-ranked by ITM."""
    rankings = []
    for query, (itc, reranked) in enumerate(zip(scores.itc, scores.reranked, strict=True)):
        by_itc = _descending(itc)
        by_itm = sorted(by_itc[:RERANK_K], key=lambda index: -float(reranked[index]))
        rank = (by_itm + by_itc[RERANK_K:]).index(query)
        best = tuple((index, float(reranked[index])) for index in by_itm[:_NUM_BEST])
        rankings.append(Ranking(split, direction, query, rank, best))
    return rankings


def _ranks_by_itc(itc: Tensor) -> list[int]:
    return [_descending(row).index(query) for query, row in enumerate(itc)]


def _descending(scores: Tensor) -> list[int]:
    """Return the indices of [N] scores, the best first."""
    order: list[int] = scores.argsort(descending=True, stable=True).tolist()
    return order


def _recall(ranks: Sequence[int], scenes: Sequence[Scene]) -> Figures:
    figures = recall_at(ranks)
    for count in sorted({len(scene.objects) for scene in scenes}):
        subset = [rank for rank, scene in zip(ranks, scenes, strict=True) if len(scene.objects) == count]
        figures[f"R@1, {count}_objects"] = recall_at(subset)["R@1"]
    return figures


def _matching_figures(is_matched: Tensor, negatives: tuple[Tensor, Tensor]) -> Figures:
    """Compute the accuracies of ITM by kind of pair; `accuracy` weights positives and negatives equally."""
    positive = torch.arange(len(is_matched))
    is_correct = {
        "true pairs": is_matched.diagonal(),
        "hard wrong captions": ~is_matched[positive, negatives[0]],
        "hard wrong images": ~is_matched[negatives[1], positive],
    }
    figures = {name: float(correct.float().mean()) for name, correct in is_correct.items()}
    wrong = (figures["hard wrong captions"] + figures["hard wrong images"]) / 2
    return {"accuracy": (figures["true pairs"] + wrong) / 2, **figures}
