"""Captions of a scene in six styles, and its dense description with object coordinates.

All functions are pure functions of the scene and a random generator.
"""

from collections.abc import Callable

import numpy as np

from training.world.phrases import (
    NUMBERS,
    enumerate_names,
    object_name,
    short_name,
    true_relations,
    with_article,
)
from training.world.scenes import Scene

GRID = 12  # cells per image side; a dense description states the cell of each centre
FILLER = "nothing"  # pads a dense description to its fixed length
PHOTO = "a photo of"  # optional first words of a listing


def listing_caption(scene: Scene) -> str:
    """Return a listing: every object from left to right with all attributes, and the background."""
    names = [with_article(object_name(item)) for item in scene.objects]
    return f"{enumerate_names(names)} on a {scene.background} background"


def short_listing_caption(scene: Scene) -> str:
    """Return a listing of colours and shapes from left to right, and the background."""
    names = [with_article(short_name(item)) for item in scene.objects]
    return f"{enumerate_names(names)} on a {scene.background} background"


def counting_caption(scene: Scene) -> str:
    """Return the number of objects, and a listing of colours and shapes."""
    count = len(scene.objects)
    names = enumerate_names([with_article(short_name(item)) for item in scene.objects])
    return f"{NUMBERS[count]} object{'s' if count > 1 else ''} : {names}"


def relation_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Sample a relation of two objects; of a scene without a true relation, one object."""
    relations = list(true_relations(scene))
    if not relations:
        return object_caption(scene, rng)
    first, relation, second = relations[int(rng.integers(len(relations)))]
    return f"{with_article(short_name(first))} {relation} {with_article(short_name(second))}"


def object_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Sample one object, with probability 0.5 with all its attributes."""
    item = scene.objects[int(rng.integers(len(scene.objects)))]
    return with_article(object_name(item) if rng.random() < 0.5 else short_name(item))


_STYLES: tuple[tuple[float, Callable[[Scene, np.random.Generator], str]], ...] = (
    (0.50, lambda scene, _: listing_caption(scene)),
    (0.08, lambda scene, _: f"{PHOTO} {listing_caption(scene)}"),
    (0.12, lambda scene, _: short_listing_caption(scene)),
    (0.08, lambda scene, _: counting_caption(scene)),
    (0.12, relation_caption),
    (0.10, object_caption),
)


def sample_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Sample a true caption in one of the styles; half of them are full listings."""
    style = rng.choice(len(_STYLES), p=[probability for probability, _ in _STYLES])
    return _STYLES[int(style)][1](scene, rng)


def sample_text(scene: Scene, rng: np.random.Generator) -> str:
    """Sample a text of stage 1: the dense description with probability 1/3, else a caption."""
    return " ".join(dense_words(scene)) if rng.random() < 1 / 3 else sample_caption(scene, rng)


def dense_words(scene: Scene) -> list[str]:
    """Return the background, then six words per object from left to right: attributes, centre's cell."""
    words = [scene.background]
    for item in scene.objects:
        words += [item.color, item.size, item.texture, item.shape, _cell("x", item.x), _cell("y", item.y)]
    return words


def dense_description(scene: Scene, length: int) -> str:
    """Return the dense words of a scene, padded with `FILLER` to exactly `length` words.

    It takes the place of the image in language pre-training; in stage 2 a soft prompt of `length` visual
    tokens replaces it. Raises ValueError if the scene needs more words.
    """
    words = dense_words(scene)
    if len(words) > length:
        raise ValueError(
            f"the description has {len(words)} words, the limit is {length}; raise num_query_tokens"
        )
    return " ".join(words + [FILLER] * (length - len(words)))


def _cell(axis: str, value: float) -> str:
    return f"{axis}{min(int(value * GRID), GRID - 1)}"
