import pytest

from training.world.phrases import MIN_OFFSET, find_referents, true_relations
from training.world.scenes import Scene, SceneObject, iter_scenes

RED_CIRCLE = SceneObject("circle", "red", "large", "solid", x=0.2, y=0.7, radius=0.18)
BLUE_CIRCLE = SceneObject("circle", "blue", "small", "solid", x=0.5, y=0.3, radius=0.1)
RED_STAR = SceneObject("star", "red", "small", "dotted", x=0.8, y=0.25, radius=0.1)
SCENE = Scene((RED_CIRCLE, BLUE_CIRCLE, RED_STAR), "gray", noise_seed=0)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("what size is the red circle ?", [(5, 0)]),
        ("is the blue circle left of the star ?", [(3, 1), (7, 2)]),
        ("what shape is the dotted object ?", [(5, 2)]),
        ("what color is the circle ?", []),  # two circles
        ("what shape is the small object ?", []),  # two small objects
        ("is there a green circle ?", []),
        ("how many circles are there ?", []),
        ("a large solid red circle and a small dotted red star", [(4, 0), (10, 2)]),
    ],
)
def test_a_noun_phrase_is_found_where_it_names_one_object(text: str, found: list[tuple[int, int]]) -> None:
    assert find_referents(text.split(), SCENE) == found


def test_relations_hold_by_more_than_the_least_offset_and_none_is_left_out() -> None:
    for scene in iter_scenes(0, "train", 100):
        expected = {
            (a, relation, b)
            for a in scene.objects
            for b in scene.objects
            for relation, far in (
                ("left of", b.x - a.x),
                ("right of", a.x - b.x),
                ("above", b.y - a.y),
                ("below", a.y - b.y),
            )
            if far > MIN_OFFSET
        }
        assert set(true_relations(scene)) == expected
