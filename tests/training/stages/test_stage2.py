"""Stage 2 trains the query branch and nothing else."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from model.language import LanguageModel
from tests.training.miniature import miniature_config
from training.data.batches import QaTurn
from training.data.features import ImageFeatures
from training.loop import Run
from training.provenance import hash_module
from training.stages.stage2 import (
    FrozenWeightsChangedError,
    LanguageObjective,
    build_objective,
    build_query_branch,
    soft_prompts,
    train_stage2,
)
from training.tiny.language import build_language_model
from training.tiny.recipe import build_tiny_matcher
from training.world.qa_turns import SceneQaSampler
from training.world.scenes import iter_scenes
from training.world.vocabulary import build_language_tokenizer

CONFIG = miniature_config(steps=3)
TOKENIZER = build_language_tokenizer()


@pytest.fixture
def language_model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(build_language_model(CONFIG.language_model, TOKENIZER), TOKENIZER)


class ChangingObjective:
    """An objective that changes the language model, which must stay frozen."""

    def __init__(self, language_model: LanguageModel) -> None:
        self.objective = build_objective(language_model)

    @property
    def llm(self) -> PreTrainedModel:
        return self.objective.llm

    def loss(self, prefix: Tensor, qa_turns: Sequence[Sequence[QaTurn]]) -> Tensor:
        with torch.no_grad():
            next(self.llm.parameters()).add_(0.01)
        return self.objective.loss(prefix, qa_turns)


def train(directory: Path, objective: LanguageObjective) -> tuple[torch.nn.Module, torch.nn.Module]:
    matcher = build_tiny_matcher(CONFIG)
    run = Run("stage2", directory, seed=0, device=torch.device("cpu"), autocast_dtype=None, save_every=100)
    features = ImageFeatures(torch.randn(16, 17, 16).half().numpy())
    branch = build_query_branch(matcher, CONFIG.language_model.hidden_size)
    scenes = list(iter_scenes(0, "train", 16))
    sampler = SceneQaSampler(scenes, features, CONFIG.stage2.batch_size, num_questions=2)
    return train_stage2(run, CONFIG.stage2, sampler, branch, objective), matcher


def test_the_query_branch_is_trained_and_the_language_model_stays_bit_equal(
    language_model: LanguageModel, tmp_path: Path
) -> None:
    frozen = hash_module(language_model)
    branch, matcher = train(tmp_path, build_objective(language_model))
    assert hash_module(language_model) == frozen
    trained, before = dict(branch.named_parameters()), dict(matcher.named_parameters())
    for name in (
        "query_tokens",
        "ln_vision.weight",
        "qformer.encoder.layer.0.crossattention.attention.key.weight",
    ):
        assert not torch.equal(trained[name], before[name]), name


def test_a_language_model_that_moved_is_an_error(language_model: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(FrozenWeightsChangedError, match="language model changed"):
        train(tmp_path, ChangingObjective(language_model))


def test_the_branch_starts_from_stage_1_without_its_text_side() -> None:
    matcher = build_tiny_matcher(CONFIG)
    branch = build_query_branch(matcher, 8)
    trained = matcher.state_dict()
    names = set(branch.state_dict()) - {"language_projection.weight", "language_projection.bias"}
    assert all(torch.equal(branch.state_dict()[name], trained[name]) for name in names)
    assert not [name for name in names if "embeddings" in name or "head" in name]
    image_features = torch.randn(2, 17, 16)
    expected = branch.language_projection(matcher.encode_image_queries(image_features).query_output)
    torch.testing.assert_close(soft_prompts(branch, image_features), expected)
