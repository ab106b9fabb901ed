"""How objects are named and related: the pieces that captions and questions are built from.

An object is always named with its colour directly before its shape ("small striped red circle"), so a text
can be checked word by word.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from training.world.scenes import SIZES, TEXTURES, TOLD_COLORS, TOLD_SHAPES, Scene, SceneObject

MIN_OFFSET = 0.12  # a relation is stated only of centres at least this far apart, of the image side
NUMBERS = ("zero", "one", "two", "three", "four")

_ATTRIBUTE_WORDS = frozenset((*TOLD_COLORS, *SIZES, *TEXTURES))

DIRECTIONS: dict[str, Callable[[SceneObject, SceneObject], float]] = {
    "left of": lambda a, b: b.x - a.x,
    "right of": lambda a, b: a.x - b.x,
    "above": lambda a, b: b.y - a.y,
    "below": lambda a, b: a.y - b.y,
}


def object_name(item: SceneObject) -> str:
    """All that is said of one object: size, texture, colour, shape."""
    return f"{item.size} {item.texture} {item.color} {item.shape}"


def short_name(item: SceneObject) -> str:
    """Colour and shape, which name one object of a scene uniquely."""
    return f"{item.color} {item.shape}"


def with_article(name: str) -> str:
    """A noun phrase with "a" or "an" before it."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(shape: str) -> str:
    """The plural of a shape word."""
    return "crosses" if shape == "cross" else f"{shape}s"


def enumerate_names(names: Sequence[str]) -> str:
    """`a , b and c`; punctuation stands alone, as the tokenizers split it."""
    return names[0] if len(names) == 1 else f"{' , '.join(names[:-1])} and {names[-1]}"


def true_relations(scene: Scene) -> Iterator[tuple[SceneObject, str, SceneObject]]:
    """Every (object, relation, object) that holds by more than `MIN_OFFSET`."""
    for first in scene.objects:
        for second in scene.objects:
            for relation, offset in DIRECTIONS.items():
                if offset(first, second) > MIN_OFFSET:
                    yield first, relation, second


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """One of `options`, each equally likely."""
    return options[int(rng.integers(len(options)))]


def find_referents(words: Sequence[str], scene: Scene) -> list[tuple[int, int]]:
    """The noun phrases of a text that name exactly one object: (index of the last word, index of the object).

    A noun phrase is a shape word or "object" with the attributes right before it.
    """
    found = []
    for end, noun in enumerate(words):
        if noun not in TOLD_SHAPES and noun != "object":
            continue
        named = [k for k, item in enumerate(scene.objects) if _is_named(item, words[: end + 1])]
        if len(named) == 1:
            found.append((end, named[0]))
    return found


def _is_named(item: SceneObject, words: Sequence[str]) -> bool:
    """Whether the noun phrase that ends `words` is true of an object."""
    if words[-1] not in (item.shape, "object"):
        return False
    attributes = {item.size, item.texture, item.color}
    for word in reversed(words[:-1]):
        if word not in _ATTRIBUTE_WORDS:
            return True
        if word not in attributes:
            return False
    return True
