"""Truth of captions: checked in evaluation, and used to keep false negatives out of stage 1."""

from itertools import pairwise

from training.world.captions import PHOTO, dense_words
from training.world.phrases import DIRECTIONS, NUMBERS, object_name, short_name, with_article
from training.world.scenes import TEXT_COLORS, TEXT_SHAPES, Scene, SceneObject, Split, sample_scene


def named_pairs(caption: str) -> list[tuple[str, str]]:
    """Return the (colour, shape) pairs of a caption: a colour word directly before a shape word."""
    words = caption.replace(",", " ").split()
    return [(c, s) for c, s in pairwise(words) if c in TEXT_COLORS and s in TEXT_SHAPES]


def is_true_caption(caption: str, scene: Scene) -> bool:
    """Return whether a caption has a known style and every word of it is true of the scene.

    A listing with a background, or with a number before it, must name every object, in any order.
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
        first, separator, second = text.partition(f" {relation} ")
        if separator:
            pair = _find_object(first, scene), _find_object(second, scene)
            return pair[0] is not None and pair[1] is not None and offset(pair[0], pair[1]) > 0
    return _lists_all(text, scene) if background else _listed_names(text, scene) is not None


def identified_scenes(seed: int, split: Split, count: int) -> list[Scene]:
    """Return the first `count` scenes of a split with distinct listings, as a retrieval gallery.

    No two have the same objects on the same background, so each listing is true of one scene only.
    """
    scenes: dict[tuple[frozenset[str], str], Scene] = {}
    index = 0
    while len(scenes) < count:
        scene = sample_scene(seed, split, index)
        names = frozenset(object_name(item) for item in scene.objects)
        scenes.setdefault((names, scene.background), scene)
        index += 1
    return list(scenes.values())


def _lists_all(text: str, scene: Scene) -> bool:
    names = _listed_names(text, scene)
    return names is not None and len(names) == len(scene.objects)


def _listed_names(text: str, scene: Scene) -> set[str] | None:
    """Return the short names of a listing that names each object once and truly, else None."""
    phrases = text.replace(" and ", ", ").split(", ")
    objects = [_find_object(phrase, scene) for phrase in phrases]
    names = {short_name(item) for item in objects if item is not None}
    return names if len(names) == len(phrases) else None


def _find_object(phrase: str, scene: Scene) -> SceneObject | None:
    """Return the object that a noun phrase with its article refers to truly, or None."""
    name = phrase.partition(" ")[2]
    words = name.split()
    if len(words) < 2 or phrase != with_article(name):
        return None
    for item in scene.objects:
        if words[-2:] == [item.color, item.shape]:
            allowed = [[], [item.size], [item.texture], [item.size, item.texture], [item.texture, item.size]]
            return item if words[:-2] in allowed else None
    return None
