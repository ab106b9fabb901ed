import pytest

from training.evaluation.metrics import (
    AnsweredQuestion,
    caption_figures,
    common_answers,
    recall_at,
    vqa_figures,
)
from training.world.questions import Question
from training.world.scenes import Scene, SceneObject

SCENE = Scene((SceneObject("circle", "red", "large", "solid", 0.3, 0.3, 0.18),), "gray", noise_seed=0)


def answered(question_type: str, truth: str, answer: str, num_objects: int) -> AnsweredQuestion:
    return AnsweredQuestion(Question(question_type, "?", truth), answer, num_objects)


def test_exact_match_is_counted_overall_by_question_type_and_by_number_of_objects() -> None:
    figures = vqa_figures(
        [
            answered("color", "red", "Red ", 1),
            answered("color", "red", "blue", 2),
            answered("count", "two", "two", 2),
        ]
    )
    assert figures == pytest.approx(
        {"overall": 2 / 3, "color": 0.5, "count": 1.0, "1_objects": 1.0, "2_objects": 0.5}
    )


def test_the_best_guess_without_an_image_is_the_most_common_answer_of_each_question_type() -> None:
    questions = [Question("count", "?", answer) for answer in ("one", "two", "one")]
    assert common_answers([*questions, Question("size", "?", "small")]) == {"count": "one", "size": "small"}


def test_captions_are_judged_by_what_they_name() -> None:
    captions = [
        "a large solid red circle on a gray background",
        "a red circle and a blue star on a gray background",
    ]
    assert caption_figures([*captions, "nothing"], [SCENE] * 3) == pytest.approx(
        {"wholly_true": 1 / 3, "named_pairs_true": 2 / 3, "names_an_object": 2 / 3, "distinct": 1.0}
    )


def test_recall_counts_ranks_below_k() -> None:
    assert recall_at([0, 4, 5, 99]) == {"R@1": 0.25, "R@5": 0.5, "R@10": 0.75}
