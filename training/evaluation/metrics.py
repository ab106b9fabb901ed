"""Metrics: exact match by question type, truth of captions, recall of retrieval."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from training.world.questions import QUESTION_TYPES, Question
from training.world.scenes import Scene
from training.world.truth import is_true_caption, named_pairs

Figures = dict[str, float]  # metrics by name


@dataclass(frozen=True, slots=True)
class AnsweredQuestion:
    """One question with a model's answer, and the number of objects of its scene."""

    question: Question
    answer: str
    num_objects: int

    @property
    def is_correct(self) -> bool:
        return self.answer.strip().lower() == self.question.answer


def vqa_figures(answered: Sequence[AnsweredQuestion]) -> Figures:
    """Compute exact match overall, by question type, and by number of objects (`1_objects`, …)."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for item in answered:
        for name in ("overall", item.question.question_type, f"{item.num_objects}_objects"):
            groups[name].append(item.is_correct)
    return {name: sum(correct) / len(correct) for name, correct in sorted(groups.items())}


def macro_average(figures: Figures) -> float:
    """Compute the mean over the question types among the figures of `vqa_figures`, equally weighted."""
    by_type = [figures[name] for name in QUESTION_TYPES if name in figures]
    return sum(by_type) / len(by_type)


def common_answers(questions: Sequence[Question]) -> dict[str, str]:
    """Return the most frequent answer of each question type: the best guess without an image."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for item in questions:
        counts[item.question_type][item.answer] += 1
    return {name: counter.most_common(1)[0][0] for name, counter in counts.items()}


def caption_figures(captions: Sequence[str], scenes: Sequence[Scene]) -> Figures:
    """Compute the shares of captions wholly true, naming an object, distinct; and of true named pairs."""
    named = [named_pairs(caption) for caption in captions]
    scene_pairs = [{(item.color, item.shape) for item in scene.objects} for scene in scenes]
    num_true = sum(
        pair in contained for pairs, contained in zip(named, scene_pairs, strict=True) for pair in pairs
    )
    wholly_true = [is_true_caption(text, scene) for text, scene in zip(captions, scenes, strict=True)]
    return {
        "wholly_true": sum(wholly_true) / len(captions),
        "named_pairs_true": num_true / max(1, sum(len(pairs) for pairs in named)),
        "names_an_object": sum(bool(pairs) for pairs in named) / len(captions),
        "distinct": len(set(captions)) / len(captions),
    }


def recall_at(ranks: Sequence[int], ks: Sequence[int] = (1, 5, 10)) -> Figures:
    """Compute R@k from the ranks (0: first) of the correct items."""
    return {f"R@{k}": sum(rank < k for rank in ranks) / len(ranks) for k in ks}
