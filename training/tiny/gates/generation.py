"""Captions and answers that a model generates about the validation scenes, and how many are true."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from model import DecodeRequest, Generation, GenerationParams
from model.generation import run_requests
from model.language import LanguageModel
from model.prompts import PromptTemplates
from training.evaluation.metrics import (
    AnsweredQuestion,
    Figures,
    caption_figures,
    macro_average,
    vqa_figures,
)
from training.tiny.gates.plan import NUM_EXAMPLES, NUM_MISTAKES, VALIDATION_SPLITS, GatePlan
from training.tiny.gates.results import Prediction, ScenePredictions
from training.world.captions import listing_caption
from training.world.questions import QUESTION_TYPES, Question
from training.world.scenes import Scene
from training.world.truth import is_true_caption

# The defaults of `/caption` and `/vqa`.
CAPTION_PARAMS = GenerationParams(num_beams=5, max_new_tokens=30, length_penalty=1.0)
ANSWER_PARAMS = GenerationParams(num_beams=5, max_new_tokens=10, length_penalty=-1.0)
CAPTION = "caption"  # the question type of a prediction without question
_BATCH_SIZE = 16  # scenes; with five questions and five beams each, 400 rows


class TextGenerator(Protocol):
    """A model that generates one text for each prompt about each scene; a scene may have no prompt."""

    def caption(self, scenes: Sequence[Scene]) -> list[Generation]: ...

    def answer(
        self, scenes: Sequence[Scene], questions: Sequence[Sequence[str]]
    ) -> list[list[Generation]]: ...


@dataclass(frozen=True, slots=True)
class PromptedGenerator:
    """A language model behind soft prompts; `prefix` computes those of B scenes, [B, Q, L]."""

    language_model: LanguageModel
    prompts: PromptTemplates
    prefix: Callable[[Sequence[Scene]], Tensor]

    def caption(self, scenes: Sequence[Scene]) -> list[Generation]:
        prompts = [[self.prompts.caption_prompt()] for _ in scenes]
        return [generation for (generation,) in self._generate(scenes, prompts, CAPTION_PARAMS)]

    def answer(self, scenes: Sequence[Scene], questions: Sequence[Sequence[str]]) -> list[list[Generation]]:
        prompts = [[self.prompts.question_prompt(question) for question in row] for row in questions]
        return self._generate(scenes, prompts, ANSWER_PARAMS)

    @torch.inference_mode()
    def _generate(
        self, scenes: Sequence[Scene], prompts: Sequence[Sequence[str]], params: GenerationParams
    ) -> list[list[Generation]]:
        generations: list[list[Generation]] = []
        for start in tqdm(range(0, len(scenes), _BATCH_SIZE), desc="texts", mininterval=5):
            prefixes = self.prefix(scenes[start : start + _BATCH_SIZE])  # [B, Q, L]
            rows = prompts[start : start + _BATCH_SIZE]
            requests = [
                DecodeRequest(prefix, self.language_model.tokenize(prompt), params)
                for prefix, row in zip(prefixes, rows, strict=True)
                for prompt in row
            ]
            best = (hypotheses[0] for hypotheses in run_requests(self.language_model, requests))
            generations += [list(islice(best, len(row))) for row in rows]
        return generations


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """Figures of the generated texts by task and split, and examples."""

    figures: dict[str, Figures]
    samples: tuple[ScenePredictions, ...]
    mistakes: tuple[ScenePredictions, ...]


def measure_generation(generator: TextGenerator, plan: GatePlan) -> GenerationResult:
    """Generate a caption of every validation scene and five answers, and score them."""
    question_rows: dict[str, Figures] = {}
    caption_rows: dict[str, Figures] = {}
    examples: list[list[ScenePredictions]] = []
    for split in VALIDATION_SPLITS:
        scenes = plan.scenes(split)
        questions = plan.questions(scenes)
        captions = generator.caption(scenes)
        answers = generator.answer(scenes, [[item.question for item in row] for row in questions])
        question_rows[f"questions, {split}"] = _question_figures(scenes, questions, answers)
        caption_rows |= _caption_rows([caption.text for caption in captions], scenes, f"captions, {split}")
        examples.append(
            [
                ScenePredictions(
                    split, index, (_score_caption(caption, scene), *map(_score_answer, row, row_answers))
                )
                for index, (scene, caption, row, row_answers) in enumerate(
                    zip(scenes, captions, questions, answers, strict=True)
                )
            ]
        )
    return GenerationResult(
        figures=question_rows | caption_rows,
        samples=tuple(example for of_split in examples for example in of_split[:NUM_EXAMPLES]),
        mistakes=tuple(_worst(example for of_split in examples for example in of_split)),
    )


def _question_figures(
    scenes: Sequence[Scene],
    questions: Sequence[Sequence[Question]],
    answers: Sequence[Sequence[Generation]],
) -> Figures:
    answered = [
        AnsweredQuestion(question, answer.text, len(scene.objects))
        for scene, row, row_answers in zip(scenes, questions, answers, strict=True)
        for question, answer in zip(row, row_answers, strict=True)
    ]
    figures = vqa_figures(answered)
    first = [name for name in ("overall", *QUESTION_TYPES) if name in figures]
    others = [name for name in figures if name not in first]  # by number of objects
    return {"macro": macro_average(figures), **{name: figures[name] for name in [*first, *others]}}


def _caption_rows(captions: Sequence[str], scenes: Sequence[Scene], name: str) -> dict[str, Figures]:
    rows = {name: caption_figures(captions, scenes)}
    for count in sorted({len(scene.objects) for scene in scenes}):
        indices = [k for k, scene in enumerate(scenes) if len(scene.objects) == count]
        rows[f"{name}, {count}_objects"] = caption_figures(
            [captions[k] for k in indices], [scenes[k] for k in indices]
        )
    return rows


def _score_caption(caption: Generation, scene: Scene) -> Prediction:
    is_correct = is_true_caption(caption.text, scene)
    return Prediction("", CAPTION, caption.text, listing_caption(scene), is_correct, caption.score)


def _score_answer(question: Question, answer: Generation) -> Prediction:
    is_correct = AnsweredQuestion(question, answer.text, num_objects=0).is_correct
    return Prediction(
        question.question, question.question_type, answer.text, question.answer, is_correct, answer.score
    )


def _worst(examples: Iterable[ScenePredictions]) -> Iterator[ScenePredictions]:
    """Yield the wrong captions, then the wrong answers, with the highest scores, one per example."""
    wrong = [
        ScenePredictions(example.split, example.index, (prediction,))
        for example in examples
        for prediction in example.predictions
        if not prediction.is_correct
    ]
    wrong.sort(key=lambda example: -example.predictions[0].score)
    for is_caption in (True, False):
        of_kind = (
            example for example in wrong if (example.predictions[0].question_type == CAPTION) is is_caption
        )
        yield from islice(of_kind, NUM_MISTAKES)
