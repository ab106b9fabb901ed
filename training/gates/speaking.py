"""What a model says of scenes, in captions and answers, and how much of it is true."""

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
from training.captions import listing_caption
from training.gates.findings import SceneSample, Statement
from training.gates.plan import NUM_EXAMPLES, NUM_MISTAKES, VALIDATION_SPLITS, Plan
from training.metrics import Answered, Figures, caption_figures, macro_average, vqa_figures
from training.questions import FAMILIES, Question
from training.scenes import Scene
from training.truth import is_true_caption

# What `/caption` and `/vqa` answer with unless told otherwise.
CAPTION_PARAMS = GenerationParams(num_beams=5, max_new_tokens=30, length_penalty=1.0)
ANSWER_PARAMS = GenerationParams(num_beams=5, max_new_tokens=10, length_penalty=-1.0)
CAPTION = "caption"  # the family of a statement that answers no question
_BATCH = 16  # scenes at once: with five questions and five beams each, 400 rows


class Speaker(Protocol):
    """A model that says one thing to each prompt about each scene; an empty list of prompts is no error."""

    def caption(self, scenes: Sequence[Scene]) -> list[Generation]: ...

    def answer(self, scenes: Sequence[Scene], asked: Sequence[Sequence[str]]) -> list[list[Generation]]: ...


@dataclass(frozen=True, slots=True)
class PromptedSpeaker:
    """A language model that goes on from a prefix; `prefix` gives those of B scenes, [B, Q, L]."""

    language_model: LanguageModel
    prompts: PromptTemplates
    prefix: Callable[[Sequence[Scene]], Tensor]

    def caption(self, scenes: Sequence[Scene]) -> list[Generation]:
        prompts = [[self.prompts.caption_prompt()] for _ in scenes]
        return [said for (said,) in self._say(scenes, prompts, CAPTION_PARAMS)]

    def answer(self, scenes: Sequence[Scene], asked: Sequence[Sequence[str]]) -> list[list[Generation]]:
        prompts = [[self.prompts.question_prompt(question) for question in row] for row in asked]
        return self._say(scenes, prompts, ANSWER_PARAMS)

    @torch.inference_mode()
    def _say(
        self, scenes: Sequence[Scene], prompts: Sequence[Sequence[str]], params: GenerationParams
    ) -> list[list[Generation]]:
        said: list[list[Generation]] = []
        for start in tqdm(range(0, len(scenes), _BATCH), desc="texts", mininterval=5):
            prefixes = self.prefix(scenes[start : start + _BATCH])  # [B, Q, L]
            rows = prompts[start : start + _BATCH]
            jobs = [
                DecodeRequest(prefix, self.language_model.tokenize(prompt), params)
                for prefix, row in zip(prefixes, rows, strict=True)
                for prompt in row
            ]
            best = (answers[0] for answers in run_requests(self.language_model, jobs))
            said += [list(islice(best, len(row))) for row in rows]
        return said


@dataclass(frozen=True, slots=True)
class Spoken:
    """What a speaker said of the validation scenes: figures by task and split, and examples."""

    figures: dict[str, Figures]
    samples: tuple[SceneSample, ...]
    mistakes: tuple[SceneSample, ...]


def measure_speaker(speaker: Speaker, plan: Plan) -> Spoken:
    """Asks for a caption of every scene and five answers, and judges them."""
    questions: dict[str, Figures] = {}
    captions: dict[str, Figures] = {}
    told: list[list[SceneSample]] = []
    for split in VALIDATION_SPLITS:
        scenes = plan.scenes(split)
        asked = plan.questions(scenes)
        captioned = speaker.caption(scenes)
        answers = speaker.answer(scenes, [[item.question for item in row] for row in asked])
        questions[f"questions, {split}"] = _question_figures(scenes, asked, answers)
        captions |= _caption_rows([said.text for said in captioned], scenes, f"captions, {split}")
        told.append(
            [
                SceneSample(split, index, (_judge_caption(caption, scene), *map(_judge_answer, row, given)))
                for index, (scene, caption, row, given) in enumerate(
                    zip(scenes, captioned, asked, answers, strict=True)
                )
            ]
        )
    return Spoken(
        figures=questions | captions,
        samples=tuple(sample for of_split in told for sample in of_split[:NUM_EXAMPLES]),
        mistakes=tuple(_worst(sample for of_split in told for sample in of_split)),
    )


def _question_figures(
    scenes: Sequence[Scene], asked: Sequence[Sequence[Question]], answers: Sequence[Sequence[Generation]]
) -> Figures:
    answered = [
        Answered(question, said.text, len(scene.objects))
        for scene, row, given in zip(scenes, asked, answers, strict=True)
        for question, said in zip(row, given, strict=True)
    ]
    figures = vqa_figures(answered)
    first = [name for name in ("overall", *FAMILIES) if name in figures]
    others = [name for name in figures if name not in first]  # by number of objects
    return {"macro": macro_average(figures), **{name: figures[name] for name in [*first, *others]}}


def _caption_rows(captions: Sequence[str], scenes: Sequence[Scene], name: str) -> dict[str, Figures]:
    rows = {name: caption_figures(captions, scenes)}
    for count in sorted({len(scene.objects) for scene in scenes}):
        chosen = [k for k, scene in enumerate(scenes) if len(scene.objects) == count]
        rows[f"{name}, {count}_objects"] = caption_figures(
            [captions[k] for k in chosen], [scenes[k] for k in chosen]
        )
    return rows


def _judge_caption(said: Generation, scene: Scene) -> Statement:
    right = is_true_caption(said.text, scene)
    return Statement("", CAPTION, said.text, listing_caption(scene), right, said.score)


def _judge_answer(question: Question, said: Generation) -> Statement:
    right = Answered(question, said.text, num_objects=0).right
    return Statement(question.question, question.family, said.text, question.answer, right, said.score)


def _worst(samples: Iterable[SceneSample]) -> Iterator[SceneSample]:
    """The wrong captions, then the wrong answers, that the model was most sure of, one to a sample."""
    wrong = [
        SceneSample(sample.split, sample.index, (statement,))
        for sample in samples
        for statement in sample.statements
        if not statement.right
    ]
    wrong.sort(key=lambda sample: -sample.statements[0].score)
    for is_caption in (True, False):
        of_kind = (sample for sample in wrong if (sample.statements[0].family == CAPTION) is is_caption)
        yield from islice(of_kind, NUM_MISTAKES)
