"""Accuracy of the embedded models over HTTP, on scenes outside the training data.

The same measurement at full size is `python -m training evaluate`; the model card holds its figures.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.processes import service
from training.evaluation.client import ServerClient
from training.evaluation.evaluate import EvaluationPlan, evaluate
from training.evaluation.metrics import Figures
from training.world.questions import QUESTION_TYPES
from training.world.scenes import Split


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerClient]:
    with (
        service(tmp_path_factory.mktemp("service"), model="tiny", dtype="float32") as server,
        ServerClient(server.url, concurrency=8) as client,
    ):
        yield client


def measure(client: ServerClient, split: Split, num_reranked: int) -> dict[str, Figures]:
    plan = EvaluationPlan(7, split, num_scenes=150, questions_per_scene=8, num_reranked=num_reranked)
    return evaluate(client, plan)


@pytest.mark.slow
def test_unseen_scenes(client: ServerClient) -> None:
    figures = measure(client, "unseen", num_reranked=20)
    questions, captions = figures["questions"], figures["captions"]
    assert questions["overall"] >= 0.9
    assert {name: questions[name] for name in QUESTION_TYPES if questions[name] < 0.8} == {}
    assert captions["named_pairs_true"] >= 0.95
    assert captions["wholly_true"] >= 0.85
    assert captions["names_an_object"] == 1
    assert captions["distinct"] >= 0.9
    for direction in ("image to text", "text to image"):
        assert figures[f"retrieval {direction}, itc"]["R@1"] >= 0.88
        assert figures[f"retrieval {direction}, rerank"]["R@1"] >= 0.9


@pytest.mark.slow
def test_pairs_of_color_and_shape_that_no_training_scene_has(client: ServerClient) -> None:
    figures = measure(client, "held-out", num_reranked=0)
    assert figures["questions"]["overall"] >= 0.87
    assert figures["captions"]["wholly_true"] >= 0.7
    for direction in ("image to text", "text to image"):
        assert figures[f"retrieval {direction}, itc"]["R@1"] >= 0.85


@pytest.mark.slow
def test_the_sibling_with_a_t5_answers_and_captions_too(tmp_path: Path) -> None:
    with (
        service(tmp_path, model="tiny-t5", dtype="float32") as server,
        ServerClient(server.url, concurrency=8) as client,
    ):
        plan = EvaluationPlan(7, "unseen", num_scenes=100, questions_per_scene=5, num_reranked=0)
        figures = evaluate(client, replace(plan, tasks=("questions", "captions")))
    assert figures["questions"]["overall"] >= 0.8
    assert figures["captions"]["named_pairs_true"] >= 0.9
    assert figures["captions"]["wholly_true"] >= 0.7
