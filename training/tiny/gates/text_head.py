"""The text head of a stage-1 model on the validation scenes: its loss per token."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from model.matching import Matcher
from training.stages.text_head import text_loss
from training.world.captions import listing_caption, sample_text
from training.world.scenes import Scene


def token_losses(
    matcher: Matcher, image_features: Tensor, scenes: Sequence[Scene], seed: int
) -> dict[str, float]:
    """Compute the loss per token, in nats, of listings and of texts of every style of stage 1."""
    sampled = [sample_text(scene, np.random.default_rng([seed, k])) for k, scene in enumerate(scenes)]
    return {
        "listings": text_loss(matcher, image_features, [listing_caption(scene) for scene in scenes]),
        "texts of every style": text_loss(matcher, image_features, sampled),
    }
