"""AdamW with decoupled weight decay, and its learning-rate schedule (BLIP-2, §3.4)."""

from math import cos, pi

import torch
from torch import nn

from training.config import Optimization


def build_optimizer(model: nn.Module, optimization: Optimization) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters; vectors and scalars get no weight decay.

    The temperature is such a scalar: decay would sharpen the contrastive softmax without end. The query
    tokens [1, Q, D] are decayed, as in LAVIS.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": optimization.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optimization.learning_rate, betas=(0.9, optimization.beta2))


def learning_rate_at(step: int, optimization: Optimization) -> float:
    """Return the learning rate of update `step`, counted from 0: linear warm-up, then cosine decay."""
    warmup_steps = optimization.num_warmup_steps
    if step < warmup_steps:
        return optimization.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, optimization.steps - warmup_steps)
    span = optimization.learning_rate - optimization.min_learning_rate
    return optimization.min_learning_rate + span * 0.5 * (1 + cos(pi * min(1.0, progress)))
