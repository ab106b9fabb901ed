"""What can be truly said and asked of a scene: captions, questions, and the dense description.

Everything is a pure function of the scene and a random generator. An object is always named with its
colour directly before its shape ("small striped red circle"), so a caption can be checked word by word.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from training.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, TEXTURES, TRAIN_PAIRS, Scene, SceneObject

MIN_OFFSET = (
    0.12  # a relation is stated only where the centres are at least this far apart, of the image side
)
GRID = 12  # cells per side in which a dense description gives a centre
FILLER = "nothing"  # fills a dense description up to its fixed length
MAX_QUESTIONS = 20  # a scene of one object has some forty distinct ones
NUMBERS = ("zero", "one", "two", "three")

_DIRECTIONS: dict[str, Callable[[SceneObject, SceneObject], float]] = {
    "left of": lambda a, b: b.x - a.x,
    "right of": lambda a, b: a.x - b.x,
    "above": lambda a, b: b.y - a.y,
    "below": lambda a, b: a.y - b.y,
}
FAMILIES = (
    "color",
    "shape",
    "size",
    "texture",
    "count",
    "existence",
    "left_right",
    "above_below",
    "background",
)


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its only true answer; `family` is one of `FAMILIES`."""

    family: str
    question: str
    answer: str


def object_name(item: SceneObject) -> str:
    """All that is said of one object: size, texture, colour, shape."""
    return f"{item.size} {item.texture} {item.color} {item.shape}"


def short_name(item: SceneObject) -> str:
    """Colour and shape, which name one object of a scene uniquely."""
    return f"{item.color} {item.shape}"


def listing_caption(scene: Scene) -> str:
    """Every object from left to right with all its attributes, and the background."""
    names = [_article(object_name(item)) for item in scene.objects]
    return f"{_enumerate(names)} on a {scene.background} background"


def sample_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A true caption: mostly the full listing, else a relation, or a listing of colours and shapes only."""
    draw = rng.random()
    relations = list(_true_relations(scene))
    if relations and draw < 0.2:
        first, relation, second = relations[int(rng.integers(len(relations)))]
        return f"{_article(short_name(first))} {relation} {_article(short_name(second))}"
    if draw < 0.4:
        names = [_article(short_name(item)) for item in scene.objects]
        return f"{_enumerate(names)} on a {scene.background} background"
    return listing_caption(scene)


def dense_description(scene: Scene, length: int) -> str:
    """The scene as exactly `length` words: background, six words per object from left to right, filler.

    It stands for the image while the language model learns to read; a soft prompt of `length` visual
    tokens takes its place later.
    """
    words = [scene.background]
    for item in scene.objects:
        words += [item.color, item.size, item.texture, item.shape, _cell("x", item.x), _cell("y", item.y)]
    if len(words) > length:
        raise ValueError(
            f"the description has {len(words)} words, the limit is {length}; raise num_query_tokens"
        )
    return " ".join(words + [FILLER] * (length - len(words)))


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


def vocabulary() -> tuple[str, ...]:
    """Every word that captions and questions are made of, and those a prompt may bring."""
    grammar = [
        "a",
        "an",
        "and",
        ",",
        "on",
        "background",
        "is",
        "there",
        "the",
        "what",
        "color",
        "shape",
        "size",
        "texture",
        "how",
        "many",
        "are",
        "objects",
        "object",
        "of",
        "left",
        "right",
        "above",
        "below",
        "image",
        "photo",
        "question",
        "short",
        "answer",
        ":",
        "?",
        ".",
        "yes",
        "no",
    ]
    words = [
        *grammar,
        *COLORS,
        *SHAPES,
        *[f"{s}s" for s in SHAPES],
        "crosses",
        *TEXTURES,
        *SIZES,
        *BACKGROUNDS,
    ]
    return tuple(dict.fromkeys([*words, *NUMBERS, FILLER]))


def description_words() -> tuple[str, ...]:
    """The words that only dense descriptions use."""
    return tuple(f"{axis}{cell}" for axis in "xy" for cell in range(GRID))


def named_pairs(caption: str) -> list[tuple[str, str]]:
    """The (colour, shape) pairs a caption names: a colour word directly followed by a shape word."""
    words = caption.replace(",", " ").split()
    return [(c, s) for c, s in pairwise(words) if c in COLORS and s in SHAPES]


def is_true_caption(caption: str, scene: Scene) -> bool:
    """Whether every word of a caption is true of the scene and the caption is of a known form."""
    text, _, background = caption.partition(" on a ")
    if background and background != f"{scene.background} background":
        return False
    for relation, offset in _DIRECTIONS.items():
        first, found, second = text.partition(f" {relation} ")
        if found:
            pair = _find(first, scene), _find(second, scene)
            return pair[0] is not None and pair[1] is not None and offset(pair[0], pair[1]) > 0
    names = text.replace(" and ", ", ").replace(" , ", ", ").split(", ")
    found_objects = [_find(name, scene) for name in names]
    shorts = Counter(short_name(item) for item in found_objects if item is not None)
    return (
        None not in found_objects
        and max(shorts.values()) == 1
        and (not background or len(names) == len(scene.objects))
    )


def _find(phrase: str, scene: Scene) -> SceneObject | None:
    """The object a noun phrase names truly, or None."""
    words = phrase.split()
    if len(words) < 3 or words[0] not in ("a", "an"):
        return None
    for item in scene.objects:
        if short_name(item).split() == words[-2:]:
            return item if set(words[1:-2]) <= {item.size, item.texture} else None
    return None


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _enumerate(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{' , '.join(names[:-1])} and {names[-1]}"


def _cell(axis: str, value: float) -> str:
    return f"{axis}{min(int(value * GRID), GRID - 1)}"


def _true_relations(scene: Scene) -> Iterator[tuple[SceneObject, str, SceneObject]]:
    for first in scene.objects:
        for second in scene.objects:
            for relation, offset in _DIRECTIONS.items():
                if offset(first, second) > MIN_OFFSET:
                    yield first, relation, second


def _pick(rng: np.random.Generator, options: list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _reference(scene: Scene, item: SceneObject, hidden: str, rng: np.random.Generator) -> str | None:
    """A phrase that names `item` alone without saying its attribute `hidden`."""
    attributes = [name for name in ("size", "texture", "color") if name != hidden]
    noun = "object" if hidden == "shape" else item.shape
    options = []
    for chosen in ((), *[(a,) for a in attributes], tuple(attributes)):
        same = [o for o in scene.objects if all(getattr(o, a) == getattr(item, a) for a in chosen)]
        if hidden != "shape":
            same = [o for o in same if o.shape == item.shape]
        if len(same) == 1:
            options.append(" ".join([*[getattr(item, a) for a in chosen], noun]))
    return _pick(rng, options) if options else None


def _ask_attribute(attribute: str) -> "_Sampler":
    def sample(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
        item = scene.objects[int(rng.integers(len(scene.objects)))]
        reference = _reference(scene, item, attribute, rng)
        return (reference and (f"what {attribute} is the {reference} ?", getattr(item, attribute))) or None

    return sample


def _ask_count(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    kind = rng.random()
    if kind < 0.4:
        return "how many objects are there ?", NUMBERS[len(scene.objects)]
    if kind < 0.7:
        color = _pick(rng, [*COLORS, *[item.color for item in scene.objects] * 4])
        return f"how many {color} objects are there ?", NUMBERS[sum(o.color == color for o in scene.objects)]
    shape = _pick(rng, [*SHAPES, *[item.shape for item in scene.objects] * 4])
    plural = "crosses" if shape == "cross" else f"{shape}s"
    return f"how many {plural} are there ?", NUMBERS[sum(o.shape == shape for o in scene.objects)]


def _ask_existence(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Half yes; a no keeps the colour or the shape of an object that is there, so half the words match."""
    present = {(o.color, o.shape) for o in scene.objects}
    color, shape = sorted(present)[int(rng.integers(len(present)))]
    if rng.random() < 0.5:
        return f"is there {_article(color)} {shape} ?", "yes"
    near = [p for p in TRAIN_PAIRS if (p[0] == color) != (p[1] == shape) and p not in present]
    color, shape = near[int(rng.integers(len(near)))]
    return f"is there {_article(color)} {shape} ?", "no"


def _ask_relation(relations: tuple[str, str]) -> "_Sampler":
    def sample(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
        true = [found for found in _true_relations(scene) if found[1] in relations]
        if not true:
            return None
        first, relation, second = true[int(rng.integers(len(true)))]
        answer = "yes"
        if rng.random() < 0.5:
            first, second, answer = second, first, "no"
        return f"is the {short_name(first)} {relation} the {short_name(second)} ?", answer

    return sample


def _ask_background(scene: Scene, _: np.random.Generator) -> tuple[str, str]:
    return "what color is the background ?", scene.background


_Sampler = Callable[[Scene, np.random.Generator], tuple[str, str] | None]
_SAMPLERS: dict[str, _Sampler] = {
    "color": _ask_attribute("color"),
    "shape": _ask_attribute("shape"),
    "size": _ask_attribute("size"),
    "texture": _ask_attribute("texture"),
    "count": _ask_count,
    "existence": _ask_existence,
    "left_right": _ask_relation(("left of", "right of")),
    "above_below": _ask_relation(("above", "below")),
    "background": _ask_background,
}
