"""Questions about a scene, in ten families, each with its only true answer.

Everything is a pure function of the scene and a random generator; answers are balanced where the world
allows, so that guessing pays little.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from training.world.phrases import (
    DIRECTIONS,
    MIN_OFFSET,
    NUMBERS,
    pick,
    plural,
    short_name,
    true_relations,
    with_article,
)
from training.world.scenes import COLORS, SHAPES, TOLD_PAIRS, TRAIN_PAIRS, Scene, SceneObject

MAX_QUESTIONS = 20  # a scene of one object has some forty distinct ones

FAMILIES = (
    "color",
    "shape",
    "size",
    "texture",
    "count",
    "existence",
    "left_right",
    "above_below",
    "what_is_where",
    "background",
)


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its only true answer; `family` is one of `FAMILIES`."""

    family: str
    question: str
    answer: str


def sample_question(scene: Scene, rng: np.random.Generator, family: str) -> Question | None:
    """One question of a family with a balanced choice of answers, or None where the scene allows none."""
    found = _SAMPLERS[family](scene, rng)
    return None if found is None else Question(family, *found)


def sample_questions(scene: Scene, rng: np.random.Generator, count: int) -> list[Question]:
    """`count` distinct questions, families in random order and as even as the scene allows.

    Raises ValueError where `count` is above `MAX_QUESTIONS`, which every scene can be asked.
    """
    if count > MAX_QUESTIONS:
        raise ValueError(f"{count} questions for each scene, the limit is {MAX_QUESTIONS}; ask fewer")
    questions: dict[str, Question] = {}
    while len(questions) < count:
        for k in rng.permutation(len(FAMILIES)):
            question = sample_question(scene, rng, FAMILIES[int(k)])
            if question is not None:
                questions.setdefault(question.question, question)
    return list(questions.values())[:count]


_Found = tuple[str, str] | None  # question and answer
_Sampler = Callable[[Scene, np.random.Generator], _Found]


def _ask_attribute(attribute: str) -> _Sampler:
    def sample(scene: Scene, rng: np.random.Generator) -> _Found:
        item = scene.objects[int(rng.integers(len(scene.objects)))]
        reference = _refer_to(scene, item, attribute, rng)
        if reference is None:
            return None
        forms = (f"what {attribute} is the {reference} ?", f"what is the {attribute} of the {reference} ?")
        return pick(rng, forms), getattr(item, attribute)

    return sample


def _refer_to(scene: Scene, item: SceneObject, hidden: str, rng: np.random.Generator) -> str | None:
    """A phrase that names `item` alone without saying its attribute `hidden`; None where there is none."""
    attributes = [name for name in ("size", "texture", "color") if name != hidden]
    noun = "object" if hidden == "shape" else item.shape
    same_noun = [o for o in scene.objects if noun in ("object", o.shape)]
    options = []
    for chosen in ((), *[(a,) for a in attributes], tuple(attributes)):
        if sum(all(getattr(o, a) == getattr(item, a) for a in chosen) for o in same_noun) == 1:
            options.append(" ".join([*[getattr(item, a) for a in chosen], noun]))
    return pick(rng, options) if options else None


def _ask_count(scene: Scene, rng: np.random.Generator) -> _Found:
    kind = rng.random()
    if kind < 0.4:
        noun, count = "objects", len(scene.objects)
    elif kind < 0.7:
        color = pick(rng, [*COLORS, *[item.color for item in scene.objects] * 4])
        noun, count = f"{color} objects", sum(o.color == color for o in scene.objects)
    else:
        shape = pick(rng, [*SHAPES, *[item.shape for item in scene.objects] * 4])
        noun, count = plural(shape), sum(o.shape == shape for o in scene.objects)
    where = pick(rng, ("are there", "are in the image"))
    return f"how many {noun} {where} ?", NUMBERS[count]


def _ask_existence(scene: Scene, rng: np.random.Generator) -> _Found:
    """Half yes; a no keeps the colour or the shape of an object that is there, so half the words match."""
    present = {(o.color, o.shape) for o in scene.objects}
    color, shape = sorted(present)[int(rng.integers(len(present)))]
    answer = "yes"
    if rng.random() < 0.5:
        drawn = color in COLORS and shape in SHAPES
        pairs = TRAIN_PAIRS if drawn else TOLD_PAIRS
        near = [p for p in pairs if (p[0] == color) != (p[1] == shape) and p not in present]
        color, shape = near[int(rng.integers(len(near)))]
        answer = "no"
    where = pick(rng, ("", " in the image"))
    return f"is there {with_article(color)} {shape}{where} ?", answer


def _ask_relation(relations: tuple[str, str], either: str) -> _Sampler:
    """Yes or no of one relation, or which of the two holds; `either` asks the latter."""

    def sample(scene: Scene, rng: np.random.Generator) -> _Found:
        true = [found for found in true_relations(scene) if found[1] in relations]
        if not true:
            return None
        first, relation, second = true[int(rng.integers(len(true)))]
        if rng.random() < 0.3:
            answer = relation.removesuffix(" of")
            return f"is the {short_name(first)} {either} the {short_name(second)} ?", answer
        answer = "yes"
        if rng.random() < 0.5:
            first, second, answer = second, first, "no"
        return f"is the {short_name(first)} {_in_full(relation, rng)} the {short_name(second)} ?", answer

    return sample


def _in_full(relation: str, rng: np.random.Generator) -> str:
    return pick(rng, (relation, f"to the {relation}")) if relation.endswith(" of") else relation


def _ask_what_is_where(scene: Scene, rng: np.random.Generator) -> _Found:
    """What stands on one side of an object, where exactly one other does."""
    found = []
    for item in scene.objects:
        for relation, offset in DIRECTIONS.items():
            there = [o for o in scene.objects if o is not item and offset(o, item) > 0]
            if len(there) == 1 and offset(there[0], item) > MIN_OFFSET:
                found.append((relation, item, there[0]))
    if not found:
        return None
    relation, item, answer = found[int(rng.integers(len(found)))]
    return f"what is {_in_full(relation, rng)} the {short_name(item)} ?", short_name(answer)


def _ask_background(scene: Scene, rng: np.random.Generator) -> _Found:
    forms = ("what color is the background ?", "what is the color of the background ?")
    return pick(rng, forms), scene.background


_SAMPLERS: dict[str, _Sampler] = {
    "color": _ask_attribute("color"),
    "shape": _ask_attribute("shape"),
    "size": _ask_attribute("size"),
    "texture": _ask_attribute("texture"),
    "count": _ask_count,
    "existence": _ask_existence,
    "left_right": _ask_relation(("left of", "right of"), either="left or right of"),
    "above_below": _ask_relation(("above", "below"), either="above or below"),
    "what_is_where": _ask_what_is_where,
    "background": _ask_background,
}
