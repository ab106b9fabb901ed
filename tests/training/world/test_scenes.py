import numpy as np
import pytest

from training.world.scenes import (
    COLORS,
    HELD_OUT_PAIRS,
    MAX_OBJECTS,
    TEXT_COLORS,
    TEXT_SHAPES,
    UNNAMED,
    Scene,
    Split,
    iter_scenes,
    sample_scene,
)


def pairs(scene: Scene) -> list[tuple[str, str]]:
    return [(item.color, item.shape) for item in scene.objects]


def test_splits_seeds_and_indices_give_different_scenes() -> None:
    scenes = [
        sample_scene(*key) for key in ((0, "train", 0), (0, "unseen", 0), (1, "train", 0), (0, "train", 1))
    ]
    assert len(set(scenes)) == len(scenes)


@pytest.mark.parametrize("split", ["train", "unseen"])
def test_training_and_unseen_scenes_never_hold_a_held_out_pair(split: Split) -> None:
    assert not [scene for scene in iter_scenes(0, split, 1000) if HELD_OUT_PAIRS & set(pairs(scene))]


def test_paints_without_a_name_are_never_nearest_to_a_colour_their_shape_is_held_out_in() -> None:
    for item in (item for scene in iter_scenes(0, "recolored", 500) for item in scene.objects):
        assert item.color == UNNAMED
        assert item.paint is not None
        paint = np.array(item.paint)
        nearest = min(COLORS, key=lambda name: float(np.linalg.norm(paint - COLORS[name])))
        assert (nearest, item.shape) not in HELD_OUT_PAIRS


def test_text_only_scenes_have_more_pairs_than_images_and_no_held_out_pair() -> None:
    text_only = {pair for scene in iter_scenes(0, "text-only", 1000) for pair in pairs(scene)}
    assert not text_only & HELD_OUT_PAIRS
    assert {color for color, _ in text_only} == set(TEXT_COLORS)
    assert {shape for _, shape in text_only} == set(TEXT_SHAPES)


def test_a_named_colour_is_painted_near_to_what_it_is() -> None:
    for item in (item for scene in iter_scenes(0, "train", 200) for item in scene.objects):
        assert item.paint is not None
        assert np.abs(np.array(item.paint) - COLORS[item.color]).max() <= 16


def test_a_held_out_scene_holds_exactly_one_held_out_pair() -> None:
    for scene in iter_scenes(0, "held-out", 500):
        assert len(HELD_OUT_PAIRS & set(pairs(scene))) == 1


def test_objects_are_sorted_distinct_and_inside_without_touching() -> None:
    for scene in iter_scenes(0, "train", 500):
        assert 1 <= len(scene.objects) <= MAX_OBJECTS
        assert len(set(pairs(scene))) == len(scene.objects)
        assert list(scene.objects) == sorted(scene.objects, key=lambda item: item.x)
        for item in scene.objects:
            assert item.radius < item.x < 1 - item.radius
            assert item.radius < item.y < 1 - item.radius
        for first in scene.objects:
            for second in scene.objects:
                distance = np.hypot(first.x - second.x, first.y - second.y)
                assert first is second or distance > first.radius + second.radius
