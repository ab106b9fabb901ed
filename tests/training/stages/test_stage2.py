"""Stage 2 moves the query branch and nothing else."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import OPTForCausalLM

from tests.training.miniature import miniature_config
from training.data.features import ImageFeatures
from training.loop import Run
from training.stages.stage1 import build_matcher
from training.stages.stage2 import (
    FrozenPartMovedError,
    Reader,
    build_query_branch,
    hash_weights,
    soft_prompts,
    train_stage2,
)
from training.tiny.language import OptReader, build_language_model
from training.world.qa_turns import Exchange
from training.world.scenes import iter_scenes
from training.world.vocabulary import build_language_tokenizer

CONFIG = miniature_config(steps=3)
TOKENIZER = build_language_tokenizer()


@pytest.fixture
def llm() -> OPTForCausalLM:
    torch.manual_seed(0)
    return build_language_model(CONFIG.language_model, TOKENIZER)


class MovingReader:
    """A language model that learns along, as it must not."""

    def __init__(self, llm: OPTForCausalLM) -> None:
        self.llm = llm
        self._reader = OptReader(llm, TOKENIZER)

    def loss(self, prefix: Tensor, exchanges: Sequence[Sequence[Exchange]]) -> Tensor:
        with torch.no_grad():
            next(self.llm.parameters()).add_(0.01)
        return self._reader.loss(prefix, exchanges)


def train(directory: Path, reader: Reader) -> tuple[torch.nn.Module, torch.nn.Module]:
    matcher = build_matcher(CONFIG)
    run = Run("stage2", directory, seed=0, device=torch.device("cpu"), autocast_dtype=None, save_every=100)
    features = ImageFeatures(torch.randn(16, 17, 16).half().numpy())
    branch = build_query_branch(matcher, CONFIG.language_model.hidden_size)
    scenes = list(iter_scenes(0, "train", 16))
    return train_stage2(run, CONFIG.stage2, scenes, features, branch, reader, 2), matcher


def test_the_query_branch_is_trained_and_the_language_model_stays_bit_equal(
    llm: OPTForCausalLM, tmp_path: Path
) -> None:
    frozen = hash_weights(llm)
    branch, matcher = train(tmp_path, OptReader(llm, TOKENIZER))
    assert hash_weights(llm) == frozen
    trained, before = dict(branch.named_parameters()), dict(matcher.named_parameters())
    for name in (
        "query_tokens",
        "ln_vision.weight",
        "qformer.encoder.layer.0.crossattention.attention.key.weight",
    ):
        assert not torch.equal(trained[name], before[name]), name


def test_a_language_model_that_moved_is_an_error(llm: OPTForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(FrozenPartMovedError, match="language model changed"):
        train(tmp_path, MovingReader(llm))


def test_the_branch_starts_from_stage_1_without_its_text_side() -> None:
    matcher = build_matcher(CONFIG)
    branch = build_query_branch(matcher, 8)
    trained = matcher.state_dict()
    names = set(branch.state_dict()) - {"language_projection.weight", "language_projection.bias"}
    assert all(torch.equal(branch.state_dict()[name], trained[name]) for name in names)
    assert not [name for name in names if "embeddings" in name or "head" in name]
    image_features = torch.randn(2, 17, 16)
    expected = branch.language_projection(matcher.encode_image_queries(image_features).query_output)
    torch.testing.assert_close(soft_prompts(branch, image_features), expected)
