from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.builders import build_matcher
from tests.training.test_loop import PLAN
from training.optimizers import build_optimizer, learning_rate_at


def test_the_optimizer_takes_what_is_trainable_and_nothing_else() -> None:
    frozen, trained = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 1)
    groups = build_optimizer(nn.ModuleList([frozen, trained]), PLAN).param_groups
    taken = {id(parameter) for group in groups for parameter in group["params"]}
    assert taken == {id(parameter) for parameter in trained.parameters()}


def test_the_learning_rate_warms_up_linearly_and_decays_by_a_cosine() -> None:
    assert learning_rate_at(0, PLAN) == pytest.approx(0.005)
    assert learning_rate_at(9, PLAN) == pytest.approx(0.05)
    assert learning_rate_at(35, PLAN) == pytest.approx((0.05 + 0.005) / 2)
    assert learning_rate_at(60, PLAN) == pytest.approx(0.005)
    assert learning_rate_at(0, replace(PLAN, warmup_steps=0)) == pytest.approx(0.05)


def test_vectors_and_scalars_are_not_decayed() -> None:
    model = nn.Linear(3, 2)
    model.register_parameter("temperature", nn.Parameter(torch.tensor(0.07)))
    decayed, exempt = build_optimizer(model, PLAN).param_groups
    assert [p.ndim for p in decayed["params"]] == [2]
    assert sorted(p.ndim for p in exempt["params"]) == [0, 1]
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.05, 0.0)


def test_the_temperature_is_exempt_from_decay_and_the_queries_are_not() -> None:
    matcher = build_matcher()
    names = {id(parameter): name for name, parameter in matcher.named_parameters()}
    decayed, exempt = (
        {names[id(parameter)] for parameter in group["params"]}
        for group in build_optimizer(matcher, PLAN).param_groups
    )
    assert matcher.temperature.ndim == 0
    assert "temperature" in exempt
    assert all(name.endswith(("weight", "query_tokens")) for name in decayed)
    assert all(name.endswith(("bias", "weight", "temperature")) for name in exempt)
    assert "query_tokens" in decayed  # [1, Q, D]: as in LAVIS, whose rule exempts vectors and biases alone
