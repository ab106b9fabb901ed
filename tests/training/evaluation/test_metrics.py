import pytest

from training.evaluation.metrics import Answered, caption_figures, common_answers, recall_at, vqa_figures
from training.tiny.report import format_report
from training.world.captions import listing_caption
from training.world.gallery import identified_scenes
from training.world.questions import Question
from training.world.scenes import Scene, SceneObject
from training.world.truth import is_true_caption

SCENE = Scene((SceneObject("circle", "red", "large", "solid", 0.3, 0.3, 0.18),), "gray", noise_seed=0)


def asked(family: str, right: str, given: str, num_objects: int) -> Answered:
    return Answered(Question(family, "?", right), given, num_objects)


def test_exact_match_is_counted_overall_by_family_and_by_number_of_objects() -> None:
    figures = vqa_figures(
        [asked("color", "red", "Red ", 1), asked("color", "red", "blue", 2), asked("count", "two", "two", 2)]
    )
    assert figures == pytest.approx(
        {"overall": 2 / 3, "color": 0.5, "count": 1.0, "1_objects": 1.0, "2_objects": 0.5}
    )


def test_the_best_blind_guess_is_the_most_common_answer_of_each_family() -> None:
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


def test_a_caption_of_the_gallery_is_true_of_its_own_scene_only() -> None:
    scenes = identified_scenes(3, "unseen", 60)
    for caption_of in scenes:
        assert [s for s in scenes if is_true_caption(listing_caption(caption_of), s)] == [caption_of]


def test_a_report_has_one_table_for_rows_with_the_same_columns() -> None:
    report = format_report({"a": {"x": 0.5}, "b": {"x": 1.0}, "c": {"y": 0.25}})
    assert report.splitlines() == [
        "|  | x |",
        "| --- | --- |",
        "| a | 0.500 |",
        "| b | 1.000 |",
        "",
        "|  | y |",
        "| --- | --- |",
        "| c | 0.250 |",
    ]
