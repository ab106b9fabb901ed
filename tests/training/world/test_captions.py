import numpy as np
import pytest

from training.world.captions import (
    counting_caption,
    dense_description,
    dense_words,
    listing_caption,
    object_caption,
    relation_caption,
    sample_caption,
    sample_text,
    short_listing_caption,
)
from training.world.scenes import Scene, SceneObject, Split, iter_scenes
from training.world.truth import is_true_caption

CIRCLE = SceneObject("circle", "red", "large", "solid", x=0.25, y=0.75, radius=0.18)
CROSS = SceneObject("cross", "orange", "small", "striped", x=0.8, y=0.2, radius=0.1)
SCENE = Scene((CIRCLE, CROSS), "gray", noise_seed=0)


def test_each_style_says_what_it_is_for() -> None:
    rng = np.random.default_rng(0)
    full = "a large solid red circle and a small striped orange cross on a gray background"
    assert listing_caption(SCENE) == full
    assert short_listing_caption(SCENE) == "a red circle and an orange cross on a gray background"
    assert counting_caption(SCENE) == "two objects : a red circle and an orange cross"
    assert counting_caption(Scene((CIRCLE,), "gray", 0)) == "one object : a red circle"
    assert {relation_caption(SCENE, rng) for _ in range(50)} == {
        "a red circle left of an orange cross",
        "an orange cross right of a red circle",
        "an orange cross above a red circle",
        "a red circle below an orange cross",
    }
    assert {object_caption(SCENE, rng) for _ in range(50)} == {
        "a red circle",
        "a large solid red circle",
        "an orange cross",
        "a small striped orange cross",
    }


@pytest.mark.parametrize("split", ["train", "held-out", "text-only"])
def test_every_sampled_text_is_true_of_its_scene(split: Split) -> None:
    rng = np.random.default_rng(0)
    drawn = [(scene, sample_text(scene, rng)) for scene in iter_scenes(0, split, 600)]
    assert [text for scene, text in drawn if not is_true_caption(text, scene)] == []
    dense = [text for scene, text in drawn if text == " ".join(dense_words(scene))]
    assert 150 < len(dense) < 250


def test_half_of_the_captions_list_everything() -> None:
    rng = np.random.default_rng(0)
    scenes = list(iter_scenes(0, "train", 1000))
    listings = sum(sample_caption(scene, rng) == listing_caption(scene) for scene in scenes)
    assert 450 < listings < 560


def test_the_dense_description_has_exactly_the_asked_length() -> None:
    words = dense_description(SCENE, 16).split()
    assert words[:7] == ["gray", "red", "large", "solid", "circle", "x3", "y9"]
    assert words[13:] == ["nothing"] * 3
    with pytest.raises(ValueError, match="13 words, the limit is 12"):
        dense_description(SCENE, 12)
