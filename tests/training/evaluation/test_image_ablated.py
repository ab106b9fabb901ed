from pathlib import Path

import pytest
import torch

from model import TaskUnavailableError
from tests.training.miniature import miniature_config
from training.evaluation.image_ablated import load_blind_speaker
from training.tiny.recipe import TinyTraining
from training.world.questions import Question


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    training = TinyTraining(miniature_config(steps=2), tmp_path_factory.mktemp("run"), torch.device("cpu"))
    training.run(["language_model", "vision_model", "stage1", "retrieval", "stage2"])
    return training.out / "model"


def test_the_same_question_has_the_same_answer_whatever_the_scene(run: Path) -> None:
    blind = load_blind_speaker(str(run / "stage2"))
    color, count = (Question(name, f"what {name} is the circle ?", "red") for name in ("color", "size"))
    (first, other), (again,) = blind.answer([[color, count], [color]])
    assert first == again == blind.answer([[color]])[0][0]
    assert blind.caption() == blind.caption()
    assert isinstance(other, str)


def test_a_checkpoint_without_language_model_is_refused(run: Path) -> None:
    with pytest.raises(TaskUnavailableError, match="has no language model"):
        load_blind_speaker(str(run / "retrieval"))
