"""Retrieval fine-tuning of a stage-1 model, on captions that name everything.

ITC learns from what else is in the batch, so the batch is large; ITM, whose joint passes cost most, takes a
part of it, with hard negatives from the whole. The paper (§4.4) also trains the image encoder and keeps ITG;
here the encoder is frozen, and ITG, which no route needs of this model, is left out to save half the time.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.matching import Matcher
from training.config import Retrieval
from training.features import ImageFeatures
from training.loop import Losses, Run, train
from training.losses import itc_loss
from training.scene_text import listing_caption
from training.scenes import Scene
from training.stage1 import contrast, matching_loss


def retrieval_losses(
    matcher: Matcher,
    image_features: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    matches: Tensor,
    num_pairs: int,
) -> Losses:
    """ITC over B images [B, P, V] and texts [B, T], ITM over the first `num_pairs`, and their sum."""
    query_output = matcher.encode_image_queries(image_features).query_output
    similarities = contrast(matcher, query_output, input_ids, attention_mask)
    loss_itc = itc_loss(similarities, matches)
    loss_itm = matching_loss(
        matcher, image_features, input_ids, attention_mask, similarities, matches, num_pairs
    )
    return {"loss": loss_itc + loss_itm, "loss_itc": loss_itc, "loss_itm": loss_itm}


def finetune_retrieval(
    run: Run, plan: Retrieval, scenes: Sequence[Scene], features: ImageFeatures, matcher: Matcher
) -> Matcher:
    """Goes on with a stage-1 model in place; resumes where a former run stopped."""
    matcher.to(run.device).train().requires_grad_(True)
    size = plan.optimization.batch_size

    def step(rng: np.random.Generator) -> Losses:
        chosen = rng.choice(len(scenes), size=size, replace=False)
        captions = [listing_caption(scenes[int(i)]) for i in chosen]
        input_ids, attention_mask = (tensor.to(run.device) for tensor in matcher.tokenize(captions))
        matches = same_captions(captions).to(run.device)
        image_features = features.load(chosen).to(run.device)
        return retrieval_losses(matcher, image_features, input_ids, attention_mask, matches, plan.num_pairs)

    train(run, matcher, step, plan.optimization)
    return matcher.eval()


def same_captions(captions: Sequence[str]) -> Tensor:
    """Which scenes share their caption, [B, B]: to the other such a caption is no negative."""
    numbers = {caption: index for index, caption in enumerate(captions)}
    kinds = torch.tensor([numbers[caption] for caption in captions])
    return kinds[:, None] == kinds[None, :]
