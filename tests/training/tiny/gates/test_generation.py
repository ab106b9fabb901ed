"""Figures of generated texts: an oracle reaches every bar, wrong texts are counted."""

from collections.abc import Callable

import pytest

from tests.training.tiny.gates.fakes import PLAN, Oracle, say
from training.tiny.gates.generation import CAPTION, measure_generation
from training.tiny.gates.language import judge_language_model
from training.tiny.gates.results import Measurement
from training.tiny.gates.stage2 import judge_stage2
from training.world.captions import listing_caption
from training.world.questions import QUESTION_TYPES


@pytest.mark.parametrize("judge", [judge_language_model, judge_stage2])
def test_a_generator_that_is_always_right_meets_every_bar(judge: Callable[..., Measurement]) -> None:
    measured = judge(measure_generation(Oracle(), PLAN))
    assert all(bar.met for bar in measured.bars)
    assert set(measured.figures["questions, unseen"].values()) == {1.0}
    assert measured.figures["captions, held-out"]["wholly_true"] == 1.0
    assert not measured.mistakes
    assert all(prediction.is_correct for sample in measured.samples for prediction in sample.predictions)
    assert {len(sample.predictions) for sample in measured.samples} == {6}  # a caption and five answers


def test_one_wrong_answer_is_counted_in_its_question_type_and_kept_as_a_mistake() -> None:
    generated = measure_generation(Oracle({"two": say("three", -0.1), "red": say("blue", -0.5)}), PLAN)
    wrong = [sample.predictions[0] for sample in generated.mistakes]
    assert {prediction.text for prediction in wrong} == {"three", "blue"}
    assert [prediction.score for prediction in wrong] == sorted((p.score for p in wrong), reverse=True)
    figures = generated.figures["questions, unseen"]
    assert figures["count"] < 1.0
    assert figures["size"] == figures["texture"] == 1.0
    assert figures["macro"] == pytest.approx(sum(figures[name] for name in QUESTION_TYPES) / 10)


def test_a_false_caption_misses_the_bar_of_captions_only() -> None:
    first = listing_caption(PLAN.scenes("unseen")[0])
    second = listing_caption(PLAN.scenes("unseen")[1])
    generated = measure_generation(Oracle({first: say("a red star"), second: say("a red")}), PLAN)
    assert generated.figures["captions, unseen"]["wholly_true"] == pytest.approx(10 / 12)
    assert [bar.name for bar in judge_language_model(generated).bars if not bar.met] == [
        "unseen: captions wholly true"
    ]
    assert {sample.predictions[0].question_type for sample in generated.mistakes} == {CAPTION}
