from pathlib import Path

import pytest
import torch

from model import TaskUnavailableError
from tests.training.miniature import miniature_config
from training.evaluation.image_ablated import load_image_ablated
from training.tiny.recipe import TinyRecipe
from training.world.questions import Question


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = TinyRecipe(miniature_config(steps=2), tmp_path_factory.mktemp("run"), torch.device("cpu"))
    recipe.run(["language_model", "vision_model", "stage1", "retrieval", "stage2"])
    return recipe.out / "model"


def test_the_same_question_has_the_same_answer_whatever_the_scene(run: Path) -> None:
    model = load_image_ablated(str(run / "stage2"))
    color, count = (Question(name, f"what {name} is the circle ?", "red") for name in ("color", "size"))
    (first, other), (again,) = model.answer([[color, count], [color]])
    assert first == again == model.answer([[color]])[0][0]
    assert model.caption() == model.caption()
    assert isinstance(other, str)


def test_a_checkpoint_without_language_model_is_refused(run: Path) -> None:
    with pytest.raises(TaskUnavailableError, match="has no language model"):
        load_image_ablated(str(run / "retrieval"))
