"""Prompt templates of captions and questions; they belong to the checkpoint."""

from collections.abc import Iterable
from dataclasses import dataclass

from model.errors import InvalidPromptError


@dataclass(frozen=True, slots=True)
class PromptTemplates:
    """The prompts in which a language model answers best.

    caption: the beginning of a caption, for instance "a photo of"; may be empty.
    question: with one `{}`, which the question replaces, for instance "Question: {} Answer:".

    Raises InvalidPromptError where `question` does not hold exactly one `{}`.
    """

    caption: str = ""
    question: str = "Question: {} Answer:"

    def __post_init__(self) -> None:
        if (count := self.question.count("{}")) != 1:
            raise InvalidPromptError(
                f"the question template {self.question[:60]!r} holds {count} places for the question; "
                "write exactly one {} in it"
            )

    def caption_prompt(self) -> str:
        return self.caption

    def question_prompt(self, question: str, history: Iterable[tuple[str, str]] = ()) -> str:
        """Return the prompt of a question after a dialogue of (question, answer) turns.

        Each turn is the template, its answer and a full stop, joined by spaces, as the authors of BLIP-2
        prompt for visual conversation (paper, section 4.1).
        """
        turns = [f"{self._fill_in(former)} {answer}." for former, answer in history]
        return " ".join([*turns, self._fill_in(question)])

    def _fill_in(self, question: str) -> str:
        return self.question.replace("{}", question)
