import numpy as np
import pytest

from training.world.phrases import MIN_OFFSET, find_referents
from training.world.questions import MAX_QUESTIONS, QUESTION_TYPES, sample_question, sample_questions
from training.world.scenes import Scene, SceneObject, Split, iter_scenes

CIRCLE = SceneObject("circle", "red", "large", "solid", x=0.25, y=0.75, radius=0.18)
CROSS = SceneObject("cross", "orange", "small", "striped", x=0.8, y=0.2, radius=0.1)
SCENE = Scene((CIRCLE, CROSS), "gray", noise_seed=0)
EXPECTED = {
    "color": ("what color is the circle ?", "red"),
    "shape": ("what is the shape of the small object ?", "cross"),
    "size": ("what size is the red circle ?", "large"),
    "texture": ("what texture is the orange cross ?", "striped"),
    "count": ("how many objects are in the image ?", "two"),
    "existence": ("is there a red circle ?", "yes"),
    "left_right": ("is the red circle left or right of the orange cross ?", "left"),
    "above_below": ("is the red circle above the orange cross ?", "no"),
    "what_is_where": ("what is to the right of the red circle ?", "orange cross"),
    "background": ("what color is the background ?", "gray"),
}


@pytest.mark.parametrize("question_type", QUESTION_TYPES)
def test_questions_of_each_type_have_one_answer_each(question_type: str) -> None:
    rng = np.random.default_rng(0)
    sampled = [sample_question(SCENE, rng, question_type) for _ in range(300)]
    pairs = {(item.question, item.answer) for item in sampled if item}
    answers: dict[str, str] = {}
    for question, answer in pairs:
        assert answers.setdefault(question, answer) == answer, "one question, two answers"
    assert EXPECTED[question_type] in pairs


@pytest.mark.parametrize("split", ["train", "held-out", "text-only"])
def test_answers_follow_from_the_scene(split: Split) -> None:
    rng = np.random.default_rng(1)
    for scene in iter_scenes(0, split, 300):
        for item in sample_questions(scene, rng, 10):
            words = item.question.split()
            named = [scene.objects[k] for _, k in find_referents(words, scene)]
            if item.question_type in ("color", "shape", "size", "texture"):
                (only,) = named
                assert getattr(only, item.question_type) == item.answer
            elif item.question_type == "existence":
                assert bool(named) is (item.answer == "yes")
            elif item.question_type in ("left_right", "above_below"):
                first, second = named
                gap = {
                    "left": second.x - first.x,
                    "right": first.x - second.x,
                    "above": second.y - first.y,
                    "below": first.y - second.y,
                }
                if "or" in words:
                    assert gap[item.answer] > MIN_OFFSET
                else:
                    (relation,) = [word for word in words if word in gap]
                    assert (gap[relation] > MIN_OFFSET) is (item.answer == "yes")
            elif item.question_type == "what_is_where":
                (reference,) = named
                others = {
                    "left": [o for o in scene.objects if o.x < reference.x],
                    "right": [o for o in scene.objects if o.x > reference.x],
                    "above": [o for o in scene.objects if o.y < reference.y],
                    "below": [o for o in scene.objects if o.y > reference.y],
                }
                (relation,) = [word for word in words if word in others]
                assert [f"{o.color} {o.shape}" for o in others[relation]] == [item.answer]


def test_yes_and_no_are_balanced() -> None:
    rng = np.random.default_rng(0)
    for question_type in ("existence", "left_right", "above_below"):
        sampled = [sample_question(scene, rng, question_type) for scene in iter_scenes(0, "train", 2000)]
        answers = [question.answer for question in sampled if question and question.answer in ("yes", "no")]
        assert 0.45 < answers.count("yes") / len(answers) < 0.55


def test_sampled_questions_are_distinct_and_as_many_as_asked() -> None:
    for scene in iter_scenes(0, "train", 200):
        questions = sample_questions(scene, np.random.default_rng(0), MAX_QUESTIONS)
        assert len({item.question for item in questions}) == MAX_QUESTIONS
    with pytest.raises(ValueError, match="21 questions for each scene, the limit is 20"):
        sample_questions(SCENE, np.random.default_rng(0), MAX_QUESTIONS + 1)
