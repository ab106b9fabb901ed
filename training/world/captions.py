"""Captions of a scene in several styles, and the dense description that lists it word by word.

Everything is a pure function of the scene and a random generator.
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

GRID = 12  # cells per side in which a dense description gives a centre
FILLER = "nothing"  # fills a dense description up to its fixed length
PHOTO = "a photo of"  # may begin a listing


def listing_caption(scene: Scene) -> str:
    """Every object from left to right with all its attributes, and the background."""
    names = [with_article(object_name(item)) for item in scene.objects]
    return f"{enumerate_names(names)} on a {scene.background} background"


def short_listing_caption(scene: Scene) -> str:
    """Every object from left to right by colour and shape, and the background."""
    names = [with_article(short_name(item)) for item in scene.objects]
    return f"{enumerate_names(names)} on a {scene.background} background"


def counting_caption(scene: Scene) -> str:
    """How many objects there are, and each by colour and shape."""
    count = len(scene.objects)
    names = enumerate_names([with_article(short_name(item)) for item in scene.objects])
    return f"{NUMBERS[count]} object{'s' if count > 1 else ''} : {names}"


def relation_caption(scene: Scene, rng: np.random.Generator) -> str:
    """How two objects stand to each other; of a scene without a clear relation, one object."""
    relations = list(true_relations(scene))
    if not relations:
        return object_caption(scene, rng)
    first, relation, second = relations[int(rng.integers(len(relations)))]
    return f"{with_article(short_name(first))} {relation} {with_article(short_name(second))}"


def object_caption(scene: Scene, rng: np.random.Generator) -> str:
    """One object alone, half of the time with all its attributes."""
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
    """A true caption in one of the styles; half of them list everything."""
    style = rng.choice(len(_STYLES), p=[share for share, _ in _STYLES])
    return _STYLES[int(style)][1](scene, rng)


def sample_text(scene: Scene, rng: np.random.Generator) -> str:
    """A caption, or in a third of the draws the dense description: what the Q-Former learns to represent."""
    return " ".join(dense_words(scene)) if rng.random() < 1 / 3 else sample_caption(scene, rng)


def dense_words(scene: Scene) -> list[str]:
    """Background, then six words for each object from left to right: attributes, cell of the centre."""
    words = [scene.background]
    for item in scene.objects:
        words += [item.color, item.size, item.texture, item.shape, _cell("x", item.x), _cell("y", item.y)]
    return words


def dense_description(scene: Scene, length: int) -> str:
    """The dense words of a scene, filled up to exactly `length` words.

    It stands for the image while the language model learns to read; a soft prompt of `length` visual
    tokens takes its place later. Raises ValueError where the scene needs more words.
    """
    words = dense_words(scene)
    if len(words) > length:
        raise ValueError(
            f"the description has {len(words)} words, the limit is {length}; raise num_query_tokens"
        )
    return " ".join(words + [FILLER] * (length - len(words)))


def _cell(axis: str, value: float) -> str:
    return f"{axis}{min(int(value * GRID), GRID - 1)}"
