import pytest

from training.world.captions import dense_words, listing_caption
from training.world.scenes import Scene, SceneObject
from training.world.truth import identified_scenes, is_true_caption, named_pairs

CIRCLE = SceneObject("circle", "red", "large", "solid", x=0.25, y=0.75, radius=0.18)
CROSS = SceneObject("cross", "orange", "small", "striped", x=0.8, y=0.2, radius=0.1)
SCENE = Scene((CIRCLE, CROSS), "gray", noise_seed=0)


@pytest.mark.parametrize(
    "caption",
    [
        "a small solid red circle and a small striped orange cross on a gray background",
        "a large solid red circle and a small striped orange cross on a white background",
        "a large solid red circle on a gray background",
        "a photo of a large solid red circle on a gray background",
        "a red cross right of an orange circle",
        "a red circle right of an orange cross",
        "a red circle above an orange cross",
        "a red circle and a red circle on a gray background",
        "a red circle and a red circle",
        "three objects : a red circle and an orange cross",
        "two object : a red circle and an orange cross",
        "two objects : a red circle",
        "a large large red circle",
        "an red circle",
        "a orange cross",
        "a blue circle",
        "red circle",
        "red",
        "",
    ],
)
def test_a_caption_with_one_wrong_word_is_not_true(caption: str) -> None:
    assert not is_true_caption(caption, SCENE)


@pytest.mark.parametrize(
    "caption",
    [
        "a large solid red circle and a small striped orange cross on a gray background",
        "a photo of an orange cross and a red circle on a gray background",
        "a red circle left of an orange cross",
        "an orange cross above a red circle",
        "two objects : a red circle and an orange cross",
        "a large red circle",
        "a solid large red circle, an orange cross",
    ],
)
def test_a_caption_that_says_less_or_in_another_order_is_still_true(caption: str) -> None:
    assert is_true_caption(caption, SCENE)


def test_a_dense_description_is_true_of_its_scene_alone() -> None:
    other = Scene((CIRCLE, CROSS), "tan", noise_seed=0)
    description = " ".join(dense_words(SCENE))
    assert is_true_caption(description, SCENE)
    assert not is_true_caption(description, other)


def test_named_pairs_are_colours_directly_before_shapes() -> None:
    assert named_pairs("a large red circle, and an orange striped cross") == [("red", "circle")]
    assert named_pairs("a gold heart") == [("gold", "heart")]  # though none is ever drawn


def test_a_caption_of_the_gallery_is_true_of_its_own_scene_only() -> None:
    scenes = identified_scenes(3, "unseen", 60)
    for caption_of in scenes:
        assert [s for s in scenes if is_true_caption(listing_caption(caption_of), s)] == [caption_of]
