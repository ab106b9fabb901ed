"""Questions about a scene, of ten types, each with its only true answer.

All functions are pure functions of the scene and a random generator. Answers are balanced where the scene
allows it, which keeps the accuracy of guessing low.
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
from training.world.scenes import COLORS, SHAPES, TEXT_PAIRS, TRAIN_PAIRS, Scene, SceneObject

MAX_QUESTIONS = 20  # per scene; a scene of one object has about forty distinct questions

QUESTION_TYPES = (
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
    """One question with its only true answer; `question_type` is one of `QUESTION_TYPES`."""

    question_type: str
    question: str
    answer: str


def sample_question(scene: Scene, rng: np.random.Generator, question_type: str) -> Question | None:
    """Sample one question of a type with balanced answers; None if the scene allows none."""
    sampled = _SAMPLERS[question_type](scene, rng)
    return None if sampled is None else Question(question_type, *sampled)


def sample_questions(scene: Scene, rng: np.random.Generator, count: int) -> list[Question]:
    """Sample `count` distinct questions, types in random order and as balanced as the scene allows.

    Raises ValueError if `count` is above `MAX_QUESTIONS`, a number that every scene supports.
    """
    if count > MAX_QUESTIONS:
        raise ValueError(f"{count} questions for each scene, the limit is {MAX_QUESTIONS}; ask fewer")
    questions: dict[str, Question] = {}
    while len(questions) < count:
        for k in rng.permutation(len(QUESTION_TYPES)):
            question = sample_question(scene, rng, QUESTION_TYPES[int(k)])
            if question is not None:
                questions.setdefault(question.question, question)
    return list(questions.values())[:count]


_QaPair = tuple[str, str] | None  # question and answer; None: the scene allows none
_Sampler = Callable[[Scene, np.random.Generator], _QaPair]


def _ask_attribute(attribute: str) -> _Sampler:
    def sample(scene: Scene, rng: np.random.Generator) -> _QaPair:
        item = scene.objects[int(rng.integers(len(scene.objects)))]
        reference = _refer_to(scene, item, attribute, rng)
        if reference is None:
            return None
        forms = (f"what {attribute} is the {reference} ?", f"what is the {attribute} of the {reference} ?")
        return pick(rng, forms), getattr(item, attribute)

    return sample


def _refer_to(scene: Scene, item: SceneObject, omitted: str, rng: np.random.Generator) -> str | None:
    """Sample a phrase that refers to `item` alone and omits one attribute; None if there is none."""
    attributes = [name for name in ("size", "texture", "color") if name != omitted]
    noun = "object" if omitted == "shape" else item.shape
    same_noun = [o for o in scene.objects if noun in ("object", o.shape)]
    options = []
    for subset in ((), *[(a,) for a in attributes], tuple(attributes)):
        if sum(all(getattr(o, a) == getattr(item, a) for a in subset) for o in same_noun) == 1:
            options.append(" ".join([*[getattr(item, a) for a in subset], noun]))
    return pick(rng, options) if options else None


def _ask_count(scene: Scene, rng: np.random.Generator) -> _QaPair:
    variant = rng.random()
    if variant < 0.4:
        noun, count = "objects", len(scene.objects)
    elif variant < 0.7:
        color = pick(rng, [*COLORS, *[item.color for item in scene.objects] * 4])
        noun, count = f"{color} objects", sum(o.color == color for o in scene.objects)
    else:
        shape = pick(rng, [*SHAPES, *[item.shape for item in scene.objects] * 4])
        noun, count = plural(shape), sum(o.shape == shape for o in scene.objects)
    ending = pick(rng, ("are there", "are in the image"))
    return f"how many {noun} {ending} ?", NUMBERS[count]


def _ask_existence(scene: Scene, rng: np.random.Generator) -> _QaPair:
    """Sample "yes" and "no" equally often; a false pair shares its colour or its shape with a true one."""
    scene_pairs = {(o.color, o.shape) for o in scene.objects}
    color, shape = sorted(scene_pairs)[int(rng.integers(len(scene_pairs)))]
    answer = "yes"
    if rng.random() < 0.5:
        has_image_words = color in COLORS and shape in SHAPES
        pairs = TRAIN_PAIRS if has_image_words else TEXT_PAIRS
        similar = [p for p in pairs if (p[0] == color) != (p[1] == shape) and p not in scene_pairs]
        color, shape = similar[int(rng.integers(len(similar)))]
        answer = "no"
    ending = pick(rng, ("", " in the image"))
    return f"is there {with_article(color)} {shape}{ending} ?", answer


def _ask_relation(relations: tuple[str, str], either: str) -> _Sampler:
    """Build a sampler of yes-no questions about a relation; 30% are either-or questions instead."""

    def sample(scene: Scene, rng: np.random.Generator) -> _QaPair:
        candidates = [triple for triple in true_relations(scene) if triple[1] in relations]
        if not candidates:
            return None
        first, relation, second = candidates[int(rng.integers(len(candidates)))]
        if rng.random() < 0.3:
            answer = relation.removesuffix(" of")
            return f"is the {short_name(first)} {either} the {short_name(second)} ?", answer
        answer = "yes"
        if rng.random() < 0.5:
            first, second, answer = second, first, "no"
        return f"is the {short_name(first)} {_vary(relation, rng)} the {short_name(second)} ?", answer

    return sample


def _vary(relation: str, rng: np.random.Generator) -> str:
    return pick(rng, (relation, f"to the {relation}")) if relation.endswith(" of") else relation


def _ask_what_is_where(scene: Scene, rng: np.random.Generator) -> _QaPair:
    """Ask for the object in one direction of another, if it is the only one there."""
    candidates = []
    for item in scene.objects:
        for relation, offset in DIRECTIONS.items():
            others = [o for o in scene.objects if o is not item and offset(o, item) > 0]
            if len(others) == 1 and offset(others[0], item) > MIN_OFFSET:
                candidates.append((relation, item, others[0]))
    if not candidates:
        return None
    relation, item, answer = candidates[int(rng.integers(len(candidates)))]
    return f"what is {_vary(relation, rng)} the {short_name(item)} ?", short_name(answer)


def _ask_background(scene: Scene, rng: np.random.Generator) -> _QaPair:
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
