"""Evaluation of a running server over HTTP on unseen scenes, compared with baselines without the image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.evaluation.client import ServerClient, encode_image
from training.evaluation.image_ablated import ImageAblatedModel, load_image_ablated
from training.evaluation.metrics import (
    AnsweredQuestion,
    Figures,
    caption_figures,
    common_answers,
    recall_at,
    vqa_figures,
)
from training.world.captions import listing_caption
from training.world.questions import Question, sample_questions
from training.world.scenes import Scene, Split, iter_scenes
from training.world.truth import identified_scenes

TASKS = ("questions", "captions", "retrieval")
_NUM_PRIOR_SCENES = 2000  # training scenes that the most common answers are counted on


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """The scenes and tasks of an evaluation: `num_scenes` scenes of a split.

    num_reranked: retrieval queries that are also re-ranked by ITM. tasks: a subset of `TASKS`.
    """

    seed: int
    split: Split
    num_scenes: int
    questions_per_scene: int
    num_reranked: int
    image_size: int = 96
    tasks: tuple[str, ...] = TASKS


def evaluate(
    client: ServerClient, plan: EvaluationPlan, image_ablated_checkpoint: str | None = None
) -> dict[str, Figures]:
    """Compute the figures of a server by task, and those of `image_ablated_checkpoint` as a baseline."""
    scenes = list(iter_scenes(plan.seed, plan.split, plan.num_scenes))
    images = [encode_image(scene, plan.image_size) for scene in scenes]
    baseline = load_image_ablated(image_ablated_checkpoint) if image_ablated_checkpoint is not None else None
    figures: dict[str, Figures] = {}
    if "questions" in plan.tasks:
        figures |= _evaluate_questions(client, plan, scenes, images, baseline)
    if "captions" in plan.tasks:
        figures |= _evaluate_captions(client, scenes, images, baseline)
    if "retrieval" in plan.tasks:
        figures |= _evaluate_retrieval(client, plan)
    return figures


def plan_questions(plan: EvaluationPlan, scenes: Sequence[Scene]) -> list[list[Question]]:
    """Sample the questions about each scene, equal for equal plans."""
    return [
        sample_questions(scene, np.random.default_rng([plan.seed, index]), plan.questions_per_scene)
        for index, scene in enumerate(scenes)
    ]


def pair_answers(
    scenes: Sequence[Scene], questions: Sequence[Sequence[Question]], answers: Sequence[Sequence[str]]
) -> list[AnsweredQuestion]:
    """Pair every question of every scene with its answer."""
    return [
        AnsweredQuestion(question, answer, len(scene.objects))
        for scene, scene_questions, scene_answers in zip(scenes, questions, answers, strict=True)
        for question, answer in zip(scene_questions, scene_answers, strict=True)
    ]


def _evaluate_questions(
    client: ServerClient,
    plan: EvaluationPlan,
    scenes: Sequence[Scene],
    images: Sequence[str],
    baseline: ImageAblatedModel | None,
) -> dict[str, Figures]:
    questions = plan_questions(plan, scenes)

    def request_answers(index: int) -> list[str]:
        body = {"image": images[index], "question": [item.question for item in questions[index]]}
        return [answer["answer"] for answer in client.post("/vqa", body)["answers"]]

    answers = client.map(request_answers, range(len(scenes)), "questions")
    figures = {"questions": vqa_figures(pair_answers(scenes, questions, answers))}
    if baseline is not None:
        ablated = pair_answers(scenes, questions, baseline.answer(questions))
        figures["questions, language model without image"] = vqa_figures(ablated)
    common = pair_answers(scenes, questions, _guess_common_answers(plan, questions))
    return figures | {
        "questions, most common answer": vqa_figures(common),
        "questions, chance": _chance(questions),
    }


def _guess_common_answers(plan: EvaluationPlan, questions: Sequence[Sequence[Question]]) -> list[list[str]]:
    """Answer each question with the most common answer of its type, counted on training scenes."""
    scenes = list(iter_scenes(plan.seed, "train", _NUM_PRIOR_SCENES))
    prior = [item for scene_questions in plan_questions(plan, scenes) for item in scene_questions]
    common = common_answers(prior)
    return [[common[item.question_type] for item in scene_questions] for scene_questions in questions]


def _chance(questions: Sequence[Sequence[Question]]) -> Figures:
    """Compute the expected exact match of a uniform guess among all answers of a question type."""
    all_questions = [item for scene_questions in questions for item in scene_questions]
    answers: dict[str, set[str]] = {}
    for item in all_questions:
        answers.setdefault(item.question_type, set()).add(item.answer)
    types = [item.question_type for item in all_questions]
    overall = sum(1 / len(answers[name]) for name in types) / len(types)
    return {"overall": overall, **{name: 1 / len(options) for name, options in sorted(answers.items())}}


def _evaluate_captions(
    client: ServerClient,
    scenes: Sequence[Scene],
    images: Sequence[str],
    baseline: ImageAblatedModel | None,
) -> dict[str, Figures]:
    def request_caption(image: str) -> str:
        caption: str = client.post("/caption", {"image": image})["captions"][0]["text"]
        return caption

    figures = {"captions": caption_figures(client.map(request_caption, images, "captions"), scenes)}
    if baseline is not None:
        ablated = [baseline.caption()] * len(scenes)
        figures["captions, language model without image"] = caption_figures(ablated, scenes)
    return figures


def _evaluate_retrieval(client: ServerClient, plan: EvaluationPlan) -> dict[str, Figures]:
    """Compute recall in both directions in a gallery of scenes with distinct captions."""
    scenes = identified_scenes(plan.seed, plan.split, plan.num_scenes)
    images = [encode_image(scene, plan.image_size) for scene in scenes]
    captions = [listing_caption(scene) for scene in scenes]

    def rank(query: dict[str, Any], candidates: dict[str, Any], mode: str, target: int) -> int:
        body = {**query, "candidates": candidates, "mode": mode, "top_k": min(10, len(scenes))}
        indices = [result["index"] for result in client.post("/retrieve", body)["results"]]
        return indices.index(target) if target in indices else len(scenes)

    def recall(mode: str, num_queries: int) -> dict[str, Figures]:
        texts, pictures = {"texts": captions}, {"images": images}
        to_text = client.map(
            lambda k: rank({"image": images[k]}, texts, mode, k), range(num_queries), f"image to text, {mode}"
        )
        to_image = client.map(
            lambda k: rank({"text": captions[k]}, pictures, mode, k),
            range(num_queries),
            f"text to image, {mode}",
        )
        return {
            f"retrieval image to text, {mode}": recall_at(to_text),
            f"retrieval text to image, {mode}": recall_at(to_image),
        }

    figures = recall("itc", len(scenes))
    if plan.num_reranked:
        figures |= recall("rerank", min(plan.num_reranked, len(scenes)))
    chance = {f"R@{k}": min(1.0, k / len(scenes)) for k in (1, 5, 10)}
    return figures | {"retrieval, chance": chance}
