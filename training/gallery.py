"""A set of scenes each of which has a caption that is true of no other: what retrieval is measured on."""

from training.scene_text import listing_caption
from training.scenes import Scene, Split, sample_scene


def identified_scenes(seed: int, split: Split, count: int) -> list[Scene]:
    """The first `count` scenes of a split whose full listings all differ.

    A listing names every object with all its attributes from left to right and the background, so where
    two listings differ neither is true of the other's scene.
    """
    found: dict[str, Scene] = {}
    index = 0
    while len(found) < count:
        scene = sample_scene(seed, split, index)
        found.setdefault(listing_caption(scene), scene)
        index += 1
    return list(found.values())
