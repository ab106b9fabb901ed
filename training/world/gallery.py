"""A set of scenes each of which has a caption that is true of no other: what retrieval is measured on."""

from training.world.phrases import object_name
from training.world.scenes import Scene, Split, sample_scene


def identified_scenes(seed: int, split: Split, count: int) -> list[Scene]:
    """The first `count` scenes of a split no two of which hold the same objects on the same background.

    A listing names all of that, so it is true of one scene of the gallery only.
    """
    found: dict[tuple[frozenset[str], str], Scene] = {}
    index = 0
    while len(found) < count:
        scene = sample_scene(seed, split, index)
        names = frozenset(object_name(item) for item in scene.objects)
        found.setdefault((names, scene.background), scene)
        index += 1
    return list(found.values())
