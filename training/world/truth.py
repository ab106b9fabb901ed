"""Whether a caption is true of a scene: what an evaluation scores, and what keeps false negatives out."""

from itertools import pairwise

from training.world.captions import PHOTO, dense_words
from training.world.phrases import DIRECTIONS, NUMBERS, short_name, with_article
from training.world.scenes import TOLD_COLORS, TOLD_SHAPES, Scene, SceneObject


def named_pairs(caption: str) -> list[tuple[str, str]]:
    """The (colour, shape) pairs a caption names: a colour word directly followed by a shape word."""
    words = caption.replace(",", " ").split()
    return [(c, s) for c, s in pairwise(words) if c in TOLD_COLORS and s in TOLD_SHAPES]


def is_true_caption(caption: str, scene: Scene) -> bool:
    """Whether a caption is of a known style and every word of it is true of the scene.

    A listing with a background, or with a number before it, must name every object; the order is free.
    """
    if caption == " ".join(dense_words(scene)):
        return True
    text = caption.replace(" , ", ", ")
    text, _, background = text.removeprefix(f"{PHOTO} ").partition(" on a ")
    if background and background != f"{scene.background} background":
        return False
    number, colon, counted = text.partition(" : ")
    if colon:
        plural = "s" if len(scene.objects) > 1 else ""
        return number == f"{NUMBERS[len(scene.objects)]} object{plural}" and _lists_all(counted, scene)
    for relation, offset in DIRECTIONS.items():
        first, found, second = text.partition(f" {relation} ")
        if found:
            pair = _find(first, scene), _find(second, scene)
            return pair[0] is not None and pair[1] is not None and offset(pair[0], pair[1]) > 0
    return _lists_all(text, scene) if background else _lists(text, scene) is not None


def _lists_all(text: str, scene: Scene) -> bool:
    found = _lists(text, scene)
    return found is not None and len(found) == len(scene.objects)


def _lists(text: str, scene: Scene) -> set[str] | None:
    """The short names that a listing names, each once and truly; None where it does anything else."""
    names = text.replace(" and ", ", ").split(", ")
    found = [_find(name, scene) for name in names]
    shorts = {short_name(item) for item in found if item is not None}
    return shorts if len(shorts) == len(names) else None


def _find(phrase: str, scene: Scene) -> SceneObject | None:
    """The object that a noun phrase with its article names truly, or None."""
    name = phrase.partition(" ")[2]
    words = name.split()
    if len(words) < 2 or phrase != with_article(name):
        return None
    for item in scene.objects:
        if words[-2:] == [item.color, item.shape]:
            allowed = [[], [item.size], [item.texture], [item.size, item.texture], [item.texture, item.size]]
            return item if words[:-2] in allowed else None
    return None
