"""The learning-rate schedule of both stages (BLIP-2, §3.4): linear warm-up, then cosine decay, by step."""

from math import cos, pi

from training.config import Optimization


def learning_rate_at(step: int, optimization: Optimization) -> float:
    """The learning rate of update number `step` (from 0)."""
    if step < optimization.warmup_steps:
        return optimization.learning_rate * (step + 1) / optimization.warmup_steps
    progress = (step - optimization.warmup_steps) / max(1, optimization.steps - optimization.warmup_steps)
    span = optimization.learning_rate - optimization.min_learning_rate
    return optimization.min_learning_rate + span * 0.5 * (1 + cos(pi * min(1.0, progress)))
