"""What the text head of the stage-1 model writes of an image, and how well it foretells true texts (ITG)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from model.matching import Matcher
from model.qformer import KeysValues
from training.captions import listing_caption, sample_text
from training.losses import IGNORED, itg_labels
from training.scenes import Scene

_BATCH = 64


def token_losses(
    matcher: Matcher, image_features: Tensor, scenes: Sequence[Scene], seed: int
) -> dict[str, float]:
    """The loss per token, in nats, of listings, and of texts of every style that stage 1 is trained on."""
    sampled = [sample_text(scene, np.random.default_rng([seed, k])) for k, scene in enumerate(scenes)]
    return {
        "listings": text_loss(matcher, image_features, [listing_caption(scene) for scene in scenes]),
        "texts of every style": text_loss(matcher, image_features, sampled),
    }


@torch.inference_mode()
def caption_greedily(matcher: Matcher, image_features: Tensor) -> list[str]:
    """Captions of images [N, P, V]: always the likeliest token, up to [SEP] or the last position.

    They start with "a", as captions do and dense descriptions, which the head has learned too, do not.
    """
    captions: list[str] = []
    for batch in tqdm(torch.split(image_features, _BATCH), desc="text head", mininterval=5):
        written = _write(matcher, matcher.encode_image_queries(batch).keys_values, len(batch))
        captions += [_read(matcher, token_ids) for token_ids in written.tolist()]
    return captions


@torch.inference_mode()
def text_loss(matcher: Matcher, image_features: Tensor, texts: Sequence[str]) -> float:
    """The mean cross-entropy of all tokens of texts, [SEP] included, each given its image [P, V]."""
    input_ids, attention_mask = matcher.tokenize(texts)
    labels = itg_labels(input_ids, attention_mask)
    input_ids[:, 0] = matcher.tokenizer.bos_token_id  # [DEC] in the place of [CLS]
    total = 0.0
    for rows in torch.split(torch.arange(len(texts)), _BATCH):
        keys_values = matcher.encode_image_queries(image_features[rows]).keys_values
        logits = matcher.generation_logits(input_ids[rows], attention_mask[rows], keys_values)
        wanted = labels[rows].flatten().to(logits.device)
        total += float(F.cross_entropy(logits.flatten(0, 1), wanted, ignore_index=IGNORED, reduction="sum"))
    return total / int((labels != IGNORED).sum())


def _write(matcher: Matcher, keys_values: Sequence[KeysValues], count: int) -> Tensor:
    """Token ids [count, T] that begin with [DEC] a; the whole text is computed anew for each token."""
    start = [matcher.tokenizer.bos_token_id, matcher.tokenizer.convert_tokens_to_ids("a")]
    written = torch.tensor([start]).repeat(count, 1)
    is_ended = torch.zeros(count, dtype=torch.bool)
    while written.shape[1] < matcher.max_text_tokens and not is_ended.all():
        logits = matcher.generation_logits(written, torch.ones_like(written), keys_values)
        chosen = logits[:, -1].argmax(dim=-1).cpu()
        is_ended |= chosen == matcher.tokenizer.sep_token_id
        written = torch.cat([written, chosen[:, None]], dim=1)
    return written


def _read(matcher: Matcher, token_ids: list[int]) -> str:
    end = matcher.tokenizer.sep_token_id
    kept = token_ids[: token_ids.index(end)] if end in token_ids else token_ids
    text: str = matcher.tokenizer.decode(kept, skip_special_tokens=True)
    return text.strip()
