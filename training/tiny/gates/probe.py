"""A linear probe: multinomial logistic regression on frozen features."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_WEIGHT_DECAY = 1e-4
_MAX_ITERATIONS = 300


@dataclass(frozen=True, slots=True)
class LinearProbe:
    """A linear classifier: features standardised by `mean` and `std` [V], `weight` [C, V], `bias` [C]."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def predict(self, features: Tensor) -> Tensor:
        """Predict the classes [N] of features [N, V]."""
        return F.linear((features - self.mean) / self.std, self.weight, self.bias).argmax(dim=1)


def fit_probe(features: Tensor, classes: Tensor, num_classes: int) -> LinearProbe:
    """Fit a probe to features [N, V] and their classes [N]; deterministic."""
    mean, std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    inputs = (features - mean) / std
    weight = torch.zeros(num_classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer: torch.optim.Optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_MAX_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> float:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(inputs, weight, bias), classes)
        value = value + _WEIGHT_DECAY * weight.square().sum()
        torch.autograd.backward(value)
        return value.item()

    optimizer.step(loss)
    return LinearProbe(mean, std, weight.detach(), bias.detach())
