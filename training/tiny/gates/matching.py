"""Retrieval in a gallery whose captions are each true of one scene, and telling true pairs from near ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from training.evaluation.metrics import Figures, recall_at
from training.tiny.gates.findings import Bar, Direction, Measured, Ranking
from training.tiny.gates.plan import NUM_EXAMPLES, NUM_MISTAKES, Plan
from training.world.captions import listing_caption
from training.world.gallery import identified_scenes
from training.world.scenes import Scene, Split
from training.world.truth import is_true_caption

RERANK_K = 16  # of which ITM has the last word; a pair takes milliseconds on a CPU
_ITC_BAR = 0.88
_RERANKED_BAR = 0.95
_NUM_SHOWN = 5  # candidates of a ranking
_DIRECTIONS: tuple[Direction, ...] = ("image to text", "text to image")


class Scorer(Protocol):
    """Scores N images against their N captions; both are named by number."""

    def similarities(self) -> Tensor:
        """The [N, N] cosines of all images (rows) with all captions."""
        ...

    def match_logits(self, images: Tensor, captions: Tensor) -> Tensor:
        """The [K, 2] matching logits of K pairs; index 1 says that they belong together."""
        ...


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of N queries (rows) against N candidates, all [N, N].

    `itc` cosines; `reranked` as the service ranks, -inf for pairs that ITM was not asked about; `is_matched`
    whether ITM takes a pair for a true one.
    """

    itc: Tensor
    reranked: Tensor
    is_matched: Tensor

    @property
    def transposed(self) -> "Scores":
        return Scores(self.itc.T, self.reranked.T, self.is_matched.T)


def measure_scorers(scorers: Mapping[Split, Scorer], plan: Plan) -> Measured:
    """Ranks the gallery of each split both ways, and puts the hardest pairs to ITM."""
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
            found = _rank_all(scores, split, direction)
            recalls[f"{direction}, ITC, {split}"] = _recall(_ranks_by_itc(scores.itc), scenes)
            recalls[f"{direction}, re-ranked, {split}"] = _recall([each.rank for each in found], scenes)
            rankings += found
    wrong = sorted((each for each in rankings if each.rank), key=lambda each: -each.rank)
    return Measured(
        figures=recalls | matching,
        bars=(),
        rankings=tuple(each for each in rankings if each.query < NUM_EXAMPLES),
        misrankings=tuple(wrong[:NUM_MISTAKES]),
    )


def judge_rankings(measured: Measured) -> Measured:
    """Holds what was measured of a model fine-tuned for retrieval against the bars."""
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
    """The most similar wrong partners by ITC [N, N]: of each image a caption, of each caption an image, [N].

    A caption that is true of a scene is no negative for it; where all are true, the scene's own stands in.
    """
    captions = [listing_caption(scene) for scene in scenes]
    texts, images = [], []
    for k, (scene, caption) in enumerate(zip(scenes, captions, strict=True)):
        texts.append(next((j for j in _descending(itc[k]) if not is_true_caption(captions[j], scene)), k))
        images.append(next((i for i in _descending(itc[:, k]) if not is_true_caption(caption, scenes[i])), k))
    return torch.tensor(texts), torch.tensor(images)


def score_pairs(scorer: Scorer, itc: Tensor, negatives: tuple[Tensor, Tensor]) -> Scores:
    """Asks ITM about the true pairs, the hard negatives, and the best of each query by ITC."""
    own = torch.arange(len(itc))
    best = min(RERANK_K, len(itc))
    wanted = torch.eye(len(itc), dtype=torch.bool)
    wanted[own, negatives[0]] = True
    wanted[negatives[1], own] = True
    wanted.scatter_(1, itc.topk(best, dim=1).indices, value=True)
    wanted.scatter_(0, itc.topk(best, dim=0).indices, value=True)
    images, captions = wanted.nonzero(as_tuple=True)
    logits = scorer.match_logits(images, captions)  # [K, 2]
    reranked = torch.full_like(itc, float("-inf"))
    reranked[images, captions] = logits[:, 1] + itc[images, captions]  # as the service scores mode "rerank"
    is_matched = torch.zeros_like(wanted)
    is_matched[images, captions] = logits[:, 1] > logits[:, 0]
    return Scores(itc, reranked, is_matched)


def _rank_all(scores: Scores, split: Split, direction: Direction) -> list[Ranking]:
    """What every query finds when its best candidates by ITC are re-ranked."""
    rankings = []
    for query, (itc, reranked) in enumerate(zip(scores.itc, scores.reranked, strict=True)):
        by_itc = _descending(itc)
        chosen = sorted(by_itc[:RERANK_K], key=lambda index: -float(reranked[index]))
        rank = (chosen + by_itc[RERANK_K:]).index(query)
        best = tuple((index, float(reranked[index])) for index in chosen[:_NUM_SHOWN])
        rankings.append(Ranking(split, direction, query, rank, best))
    return rankings


def _ranks_by_itc(itc: Tensor) -> list[int]:
    return [_descending(row).index(query) for query, row in enumerate(itc)]


def _descending(scores: Tensor) -> list[int]:
    """The indices of [N] scores, the best first."""
    order: list[int] = scores.argsort(descending=True, stable=True).tolist()
    return order


def _recall(ranks: Sequence[int], scenes: Sequence[Scene]) -> Figures:
    figures = recall_at(ranks)
    for count in sorted({len(scene.objects) for scene in scenes}):
        of_count = [rank for rank, scene in zip(ranks, scenes, strict=True) if len(scene.objects) == count]
        figures[f"R@1, {count}_objects"] = recall_at(of_count)["R@1"]
    return figures


def _matching_figures(is_matched: Tensor, negatives: tuple[Tensor, Tensor]) -> Figures:
    """Shares of pairs that ITM judges rightly; as many true ones as wrong ones in `accuracy`."""
    own = torch.arange(len(is_matched))
    shares = {
        "true pairs": is_matched.diagonal(),
        "hard wrong captions": ~is_matched[own, negatives[0]],
        "hard wrong images": ~is_matched[negatives[1], own],
    }
    figures = {name: float(right.float().mean()) for name, right in shares.items()}
    wrong = (figures["hard wrong captions"] + figures["hard wrong images"]) / 2
    return {"accuracy": (figures["true pairs"] + wrong) / 2, **figures}
