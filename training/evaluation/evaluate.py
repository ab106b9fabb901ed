"""Measures a running server over HTTP on scenes it has never seen, beside guessing blindly.

The server is asked just as a user asks it; what a blind guess scores is computed here, on the same
questions.
"""

import base64
import io
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import httpx
import numpy as np
from tqdm import tqdm

from training.evaluation.image_ablated import BlindSpeaker, load_blind_speaker
from training.evaluation.metrics import (
    Answered,
    Figures,
    caption_figures,
    common_answers,
    recall_at,
    vqa_figures,
)
from training.world.captions import listing_caption
from training.world.gallery import identified_scenes
from training.world.questions import Question, sample_questions
from training.world.scenes import Scene, Split, iter_scenes, render_scene

TASKS = ("questions", "captions", "retrieval")
_MAX_TRIES = 100
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class EvaluationError(Exception):
    """The server could not be asked, or refused; the message carries its answer."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked: `num_scenes` scenes of a split, each with `questions_per_scene` questions.

    tasks: those of `TASKS` that are measured.
    """

    seed: int
    split: Split
    num_scenes: int
    questions_per_scene: int
    num_reranked: int
    image_size: int = 96
    tasks: tuple[str, ...] = TASKS


class ServerClient:
    """The three routes of a server, asked over `concurrency` connections."""

    def __init__(self, url: str, concurrency: int) -> None:
        self._http = httpx.Client(base_url=url, timeout=120.0)
        self._concurrency = concurrency

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One request, sent again when the server says it is busy.

        Raises EvaluationError with what the server said where it is no success.
        """
        for _ in range(_MAX_TRIES):
            try:
                response = self._http.post(path, json=body)
            except httpx.HTTPError as exc:
                where = f"{self._http.base_url}{path}"
                raise EvaluationError(f"{where}: {exc!r}; is the server running?") from exc
            if response.status_code != httpx.codes.TOO_MANY_REQUESTS:
                break
            time.sleep(float(response.headers["Retry-After"]))
        if response.status_code != 200:
            raise EvaluationError(f"{path} answered {response.status_code}: {response.text[:500]}")
        answer: dict[str, Any] = response.json()
        return answer

    def map(self, ask: Callable[[_Item], _Result], items: Iterable[_Item], label: str) -> list[_Result]:
        """Asks for every item, several at a time, and keeps their order."""
        todo = list(items)
        with ThreadPoolExecutor(self._concurrency) as pool:
            return list(tqdm(pool.map(ask, todo), desc=label, total=len(todo), mininterval=5))


def encode_image(scene: Scene, image_size: int) -> str:
    """A scene as the base64 text of a PNG file."""
    buffer = io.BytesIO()
    render_scene(scene, image_size).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def evaluate(client: ServerClient, plan: Plan, blind_checkpoint: str | None = None) -> dict[str, Figures]:
    """All figures of one server, by task; with `blind_checkpoint`, those of its language model alone too."""
    scenes = list(iter_scenes(plan.seed, plan.split, plan.num_scenes))
    images = [encode_image(scene, plan.image_size) for scene in scenes]
    blind = load_blind_speaker(blind_checkpoint) if blind_checkpoint is not None else None
    figures: dict[str, Figures] = {}
    if "questions" in plan.tasks:
        figures |= _evaluate_questions(client, plan, scenes, images, blind)
    if "captions" in plan.tasks:
        figures |= _evaluate_captions(client, scenes, images, blind)
    if "retrieval" in plan.tasks:
        figures |= _evaluate_retrieval(client, plan)
    return figures


def _evaluate_questions(
    client: ServerClient,
    plan: Plan,
    scenes: Sequence[Scene],
    images: Sequence[str],
    blind: BlindSpeaker | None,
) -> dict[str, Figures]:
    asked = questions_of(plan, scenes)

    def ask(index: int) -> list[str]:
        body = {"image": images[index], "question": [item.question for item in asked[index]]}
        return [answer["answer"] for answer in client.post("/vqa", body)["answers"]]

    answers = client.map(ask, range(len(scenes)), "questions")
    figures = {"questions": vqa_figures(pair_answers(scenes, asked, answers))}
    if blind is not None:
        guessed = pair_answers(scenes, asked, blind.answer(asked))
        figures["questions, language model without image"] = vqa_figures(guessed)
    return figures | {
        "questions, most common answer": vqa_figures(pair_answers(scenes, asked, _guess(plan, asked))),
        "questions, chance": _chance(asked),
    }


def questions_of(plan: Plan, scenes: Sequence[Scene]) -> list[list[Question]]:
    """The same questions for the same plan, always."""
    return [
        sample_questions(scene, np.random.default_rng([plan.seed, index]), plan.questions_per_scene)
        for index, scene in enumerate(scenes)
    ]


def pair_answers(
    scenes: Sequence[Scene], asked: Sequence[Sequence[Question]], answers: Sequence[Sequence[str]]
) -> list[Answered]:
    """Every question of every scene beside its answer."""
    return [
        Answered(question, answer, len(scene.objects))
        for scene, questions, given in zip(scenes, asked, answers, strict=True)
        for question, answer in zip(questions, given, strict=True)
    ]


def _guess(plan: Plan, asked: Sequence[Sequence[Question]]) -> list[list[str]]:
    """The most common answer of each family, among 2,000 scenes of the split `train` with the same seed."""
    scenes = list(iter_scenes(plan.seed, "train", 2000))
    known = [item for questions in questions_of(plan, scenes) for item in questions]
    common = common_answers(known)
    return [[common[item.family] for item in questions] for questions in asked]


def _chance(asked: Sequence[Sequence[Question]]) -> Figures:
    """Expected exact match of a uniform draw among the answers a family ever has."""
    answers: dict[str, set[str]] = {}
    for item in (item for questions in asked for item in questions):
        answers.setdefault(item.family, set()).add(item.answer)
    families = [item.family for questions in asked for item in questions]
    overall = sum(1 / len(answers[family]) for family in families) / len(families)
    return {"overall": overall, **{family: 1 / len(given) for family, given in sorted(answers.items())}}


def _evaluate_captions(
    client: ServerClient, scenes: Sequence[Scene], images: Sequence[str], blind: BlindSpeaker | None
) -> dict[str, Figures]:
    def ask(image: str) -> str:
        caption: str = client.post("/caption", {"image": image})["captions"][0]["text"]
        return caption

    figures = {"captions": caption_figures(client.map(ask, images, "captions"), scenes)}
    if blind is not None:
        guessed = [blind.caption()] * len(scenes)
        figures["captions, language model without image"] = caption_figures(guessed, scenes)
    return figures


def _evaluate_retrieval(client: ServerClient, plan: Plan) -> dict[str, Figures]:
    scenes = identified_scenes(plan.seed, plan.split, plan.num_scenes)
    images = [encode_image(scene, plan.image_size) for scene in scenes]
    captions = [listing_caption(scene) for scene in scenes]

    def rank(query: dict[str, Any], candidates: dict[str, Any], mode: str, target: int) -> int:
        body = {**query, "candidates": candidates, "mode": mode, "top_k": min(10, len(scenes))}
        found = [result["index"] for result in client.post("/retrieve", body)["results"]]
        return found.index(target) if target in found else len(scenes)

    def recall(mode: str, count: int) -> dict[str, Figures]:
        texts, pictures = {"texts": captions}, {"images": images}
        to_text = client.map(
            lambda k: rank({"image": images[k]}, texts, mode, k), range(count), f"image to text, {mode}"
        )
        to_image = client.map(
            lambda k: rank({"text": captions[k]}, pictures, mode, k), range(count), f"text to image, {mode}"
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
