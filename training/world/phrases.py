"""Phrases of captions and questions: object names, relations and the objects that noun phrases refer to.

A name always has the colour directly before the shape ("small striped red circle"), so a text can be checked
word by word.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from training.world.scenes import SIZES, TEXT_COLORS, TEXT_SHAPES, TEXTURES, Scene, SceneObject

MIN_OFFSET = 0.12  # minimal distance of two centres in a stated relation / image side
NUMBERS = ("zero", "one", "two", "three", "four")

_ATTRIBUTE_WORDS = frozenset((*TEXT_COLORS, *SIZES, *TEXTURES))

DIRECTIONS: dict[str, Callable[[SceneObject, SceneObject], float]] = {
    "left of": lambda a, b: b.x - a.x,
    "right of": lambda a, b: a.x - b.x,
    "above": lambda a, b: b.y - a.y,
    "below": lambda a, b: a.y - b.y,
}


def object_name(item: SceneObject) -> str:
    """Return the full name of an object: size, texture, colour, shape."""
    return f"{item.size} {item.texture} {item.color} {item.shape}"


def short_name(item: SceneObject) -> str:
    """Return colour and shape, which identify one object of a scene."""
    return f"{item.color} {item.shape}"


def with_article(name: str) -> str:
    """Prepend "a" or "an" to a noun phrase."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(shape: str) -> str:
    """Return the plural of a shape word."""
    return "crosses" if shape == "cross" else f"{shape}s"


def enumerate_names(names: Sequence[str]) -> str:
    """Join names as `a , b and c`, with spaces around punctuation as the tokenizers split it."""
    return names[0] if len(names) == 1 else f"{' , '.join(names[:-1])} and {names[-1]}"


def true_relations(scene: Scene) -> Iterator[tuple[SceneObject, str, SceneObject]]:
    """Iterate over every (object, relation, object) that holds by more than `MIN_OFFSET`."""
    for first in scene.objects:
        for second in scene.objects:
            for relation, offset in DIRECTIONS.items():
                if offset(first, second) > MIN_OFFSET:
                    yield first, relation, second


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Sample one of `options` uniformly."""
    return options[int(rng.integers(len(options)))]


def find_referents(words: Sequence[str], scene: Scene) -> list[tuple[int, int]]:
    """Find the noun phrases that refer to exactly one object: (index of the last word, index of the object).

    A noun phrase is a shape word or "object" with the attributes directly before it.
    """
    referents = []
    for end, noun in enumerate(words):
        if noun not in TEXT_SHAPES and noun != "object":
            continue
        candidates = [k for k, item in enumerate(scene.objects) if _is_named(item, words[: end + 1])]
        if len(candidates) == 1:
            referents.append((end, candidates[0]))
    return referents


def _is_named(item: SceneObject, words: Sequence[str]) -> bool:
    """Return whether the noun phrase at the end of `words` is true of an object."""
    if words[-1] not in (item.shape, "object"):
        return False
    attributes = {item.size, item.texture, item.color}
    for word in reversed(words[:-1]):
        if word not in _ATTRIBUTE_WORDS:
            return True
        if word not in attributes:
            return False
    return True
