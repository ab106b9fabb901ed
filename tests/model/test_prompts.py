"""Prompt templates of captions and questions."""

import pytest

from model.errors import InvalidPromptError
from model.prompts import PromptTemplates


def test_question_takes_its_place_in_the_template() -> None:
    assert PromptTemplates().question_prompt("what is it?") == "Question: what is it? Answer:"


def test_earlier_turns_stand_in_front_each_with_its_answer_and_a_full_stop() -> None:
    history = [("which city is this?", "singapore"), ("why?", "it has a merlion")]
    assert PromptTemplates().question_prompt("since when?", history) == (
        "Question: which city is this? Answer: singapore. "
        "Question: why? Answer: it has a merlion. "
        "Question: since when? Answer:"
    )


def test_braces_in_a_question_are_only_characters() -> None:
    assert PromptTemplates(question="{}!").question_prompt("a {} b {0} {x}") == "a {} b {0} {x}!"


@pytest.mark.parametrize("template", ["Answer:", "{} or {}"])
def test_a_template_without_exactly_one_place_is_refused(template: str) -> None:
    with pytest.raises(InvalidPromptError, match="exactly one"):
        PromptTemplates(question=template)


def test_caption_prompt_is_that_of_the_checkpoint() -> None:
    assert PromptTemplates(caption="a photo of").caption_prompt() == "a photo of"
