"""What an evaluation reports: exact match by question family, truth of captions, recall of retrieval."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from training.world.questions import FAMILIES, Question
from training.world.scenes import Scene
from training.world.truth import is_true_caption, named_pairs

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Answered:
    """One question with the answer that a model gave, and how many objects its scene holds."""

    question: Question
    answer: str
    num_objects: int

    @property
    def right(self) -> bool:
        return self.answer.strip().lower() == self.question.answer


def vqa_figures(answered: Sequence[Answered]) -> Figures:
    """Exact match overall, for each family, and for each number of objects (`1_objects`, …)."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for item in answered:
        for name in ("overall", item.question.family, f"{item.num_objects}_objects"):
            groups[name].append(item.right)
    return {name: sum(rights) / len(rights) for name, rights in sorted(groups.items())}


def macro_average(figures: Figures) -> float:
    """The mean over the families among exact matches as `vqa_figures` gives them, each counted alike."""
    shares = [figures[family] for family in FAMILIES if family in figures]
    return sum(shares) / len(shares)


def common_answers(questions: Sequence[Question]) -> dict[str, str]:
    """The most frequent answer of each family: the best guess that looks at no image."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for item in questions:
        counts[item.family][item.answer] += 1
    return {family: counter.most_common(1)[0][0] for family, counter in counts.items()}


def caption_figures(captions: Sequence[str], scenes: Sequence[Scene]) -> Figures:
    """Shares: of captions wholly true, naming an object, distinct; of the named colour-shape pairs true."""
    named = [named_pairs(caption) for caption in captions]
    present = [{(item.color, item.shape) for item in scene.objects} for scene in scenes]
    true_pairs = sum(pair in there for pairs, there in zip(named, present, strict=True) for pair in pairs)
    wholly = [is_true_caption(text, scene) for text, scene in zip(captions, scenes, strict=True)]
    return {
        "wholly_true": sum(wholly) / len(captions),
        "named_pairs_true": true_pairs / max(1, sum(len(pairs) for pairs in named)),
        "names_an_object": sum(bool(pairs) for pairs in named) / len(captions),
        "distinct": len(set(captions)) / len(captions),
    }


def recall_at(ranks: Sequence[int], ks: Sequence[int] = (1, 5, 10)) -> Figures:
    """R@k of the ranks (0: first) at which the right items were found."""
    return {f"R@{k}": sum(rank < k for rank in ranks) / len(ranks) for k in ks}
