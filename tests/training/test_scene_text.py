import numpy as np
import pytest

from training.scene_text import (
    FAMILIES,
    dense_description,
    description_words,
    is_true_caption,
    listing_caption,
    named_pairs,
    sample_caption,
    sample_question,
    sample_questions,
    vocabulary,
)
from training.scenes import Scene, SceneObject, iter_scenes

CIRCLE = SceneObject("circle", "red", "large", "solid", x=0.25, y=0.75, radius=0.18)
CROSS = SceneObject("cross", "orange", "small", "striped", x=0.8, y=0.2, radius=0.1)
SCENE = Scene((CIRCLE, CROSS), "gray", noise_seed=0)


def test_the_listing_names_everything_from_left_to_right() -> None:
    assert (
        listing_caption(SCENE)
        == "a large solid red circle and a small striped orange cross on a gray background"
    )


def test_every_sampled_caption_is_true_of_its_scene() -> None:
    rng = np.random.default_rng(0)
    for scene in iter_scenes(0, "held-out", 300):
        assert is_true_caption(sample_caption(scene, rng), scene)


@pytest.mark.parametrize(
    "caption",
    [
        "a small solid red circle and a small striped orange cross on a gray background",
        "a large solid red circle and a small striped orange cross on a white background",
        "a large solid red circle on a gray background",
        "a red cross right of an orange circle",
        "a red circle right of an orange cross",
        "a red circle above an orange cross",
        "a red circle and a red circle on a gray background",
        "a blue circle",
        "red circle",
        "",
    ],
)
def test_a_caption_with_one_wrong_word_is_not_true(caption: str) -> None:
    assert not is_true_caption(caption, SCENE)


@pytest.mark.parametrize(
    "caption",
    [
        "a large solid red circle, and a small striped orange cross on a gray background".replace(",", ""),
        "a red circle left of an orange cross",
        "an orange cross above a red circle",
        "a red circle and an orange cross on a gray background",
    ],
)
def test_a_caption_that_says_less_is_still_true(caption: str) -> None:
    assert is_true_caption(caption, SCENE)


def test_named_pairs_are_colours_directly_before_shapes() -> None:
    assert named_pairs("a large red circle, and an orange striped cross") == [("red", "circle")]


def test_the_dense_description_has_exactly_the_asked_length() -> None:
    words = dense_description(SCENE, 16).split()
    assert words[:7] == ["gray", "red", "large", "solid", "circle", "x3", "y9"]
    assert len(words) == 16
    with pytest.raises(ValueError, match="13 words, the limit is 12"):
        dense_description(SCENE, 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_of_each_family_are_answered_by_the_scene(family: str) -> None:
    rng = np.random.default_rng(0)
    asked = {(q.question, q.answer) for q in (sample_question(SCENE, rng, family) for _ in range(200)) if q}
    answers: dict[str, str] = {}
    for question, answer in asked:
        assert answers.setdefault(question, answer) == answer, "one question, two answers"
    expected = {
        "color": ("what color is the circle ?", "red"),
        "shape": ("what shape is the small object ?", "cross"),
        "size": ("what size is the red circle ?", "large"),
        "texture": ("what texture is the orange cross ?", "striped"),
        "count": ("how many objects are there ?", "two"),
        "existence": ("is there a red circle ?", "yes"),
        "left_right": ("is the red circle left of the orange cross ?", "yes"),
        "above_below": ("is the red circle above the orange cross ?", "no"),
        "background": ("what color is the background ?", "gray"),
    }
    assert expected[family] in asked


def test_yes_and_no_are_balanced() -> None:
    rng = np.random.default_rng(0)
    for family in ("existence", "left_right", "above_below"):
        drawn = [sample_question(scene, rng, family) for scene in iter_scenes(0, "train", 1000)]
        answers = [question.answer for question in drawn if question]
        assert 0.45 < answers.count("yes") / len(answers) < 0.55


def test_sampled_questions_are_distinct_and_as_many_as_asked() -> None:
    for scene in iter_scenes(0, "train", 200):
        questions = sample_questions(scene, np.random.default_rng(0), 8)
        assert len({item.question for item in questions}) == 8


def test_every_word_of_the_world_is_in_the_vocabulary() -> None:
    known, rng = {*vocabulary(), *description_words()}, np.random.default_rng(0)
    for scene in iter_scenes(0, "held-out", 300):
        texts = [sample_caption(scene, rng), dense_description(scene, 24)]
        texts += [f"{item.question} {item.answer}" for item in sample_questions(scene, rng, 8)]
        assert set(" ".join(texts).split()) <= known
