"""Image-grounded text generation (ITG) by the text head of a stage-1 model: captions and loss per token."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from model.matching import Matcher
from model.qformer import KeysValues
from training.losses import IGNORED, itg_labels
from training.world.captions import listing_caption, sample_text
from training.world.scenes import Scene

_BATCH_SIZE = 64


def token_losses(
    matcher: Matcher, image_features: Tensor, scenes: Sequence[Scene], seed: int
) -> dict[str, float]:
    """Compute the loss per token, in nats, of listings and of texts of every style of stage 1."""
    sampled = [sample_text(scene, np.random.default_rng([seed, k])) for k, scene in enumerate(scenes)]
    return {
        "listings": text_loss(matcher, image_features, [listing_caption(scene) for scene in scenes]),
        "texts of every style": text_loss(matcher, image_features, sampled),
    }


@torch.inference_mode()
def caption_greedily(matcher: Matcher, image_features: Tensor) -> list[str]:
    """Generate captions of images [N, P, V] by greedy decoding, up to [SEP] or the last position.

    The first word is set to "a": it starts every caption and no dense description.
    """
    captions: list[str] = []
    for batch in tqdm(torch.split(image_features, _BATCH_SIZE), desc="text head", mininterval=5):
        generated = _generate(matcher, matcher.encode_image_queries(batch).keys_values, len(batch))
        captions += [_decode_tokens(matcher, token_ids) for token_ids in generated.tolist()]
    return captions


@torch.inference_mode()
def text_loss(matcher: Matcher, image_features: Tensor, texts: Sequence[str]) -> float:
    """Compute the mean cross-entropy of all tokens of texts, [SEP] included, each given its image [P, V]."""
    input_ids, attention_mask = matcher.tokenize(texts)
    labels = itg_labels(input_ids, attention_mask)
    input_ids[:, 0] = matcher.tokenizer.bos_token_id  # [DEC] replaces [CLS]
    total = 0.0
    for rows in torch.split(torch.arange(len(texts)), _BATCH_SIZE):
        keys_values = matcher.encode_image_queries(image_features[rows]).keys_values
        logits = matcher.generation_logits(input_ids[rows], attention_mask[rows], keys_values)
        row_labels = labels[rows].flatten().to(logits.device)
        total += float(
            F.cross_entropy(logits.flatten(0, 1), row_labels, ignore_index=IGNORED, reduction="sum")
        )
    return total / int((labels != IGNORED).sum())


def _generate(matcher: Matcher, keys_values: Sequence[KeysValues], count: int) -> Tensor:
    """Generate token ids [count, T] from [DEC] a; without a KV cache of the text: O(T²) per text."""
    start = [matcher.tokenizer.bos_token_id, matcher.tokenizer.convert_tokens_to_ids("a")]
    token_ids = torch.tensor([start]).repeat(count, 1)
    is_ended = torch.zeros(count, dtype=torch.bool)
    while token_ids.shape[1] < matcher.max_text_tokens and not is_ended.all():
        logits = matcher.generation_logits(token_ids, torch.ones_like(token_ids), keys_values)
        next_ids = logits[:, -1].argmax(dim=-1).cpu()
        is_ended |= next_ids == matcher.tokenizer.sep_token_id
        token_ids = torch.cat([token_ids, next_ids[:, None]], dim=1)
    return token_ids


def _decode_tokens(matcher: Matcher, token_ids: list[int]) -> str:
    end = matcher.tokenizer.sep_token_id
    text_ids = token_ids[: token_ids.index(end)] if end in token_ids else token_ids
    text: str = matcher.tokenizer.decode(text_ids, skip_special_tokens=True)
    return text.strip()
