"""Image-grounded text generation (ITG) by the text head of a stage-1 model: captions and loss per token."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from model.matching import Matcher
from model.qformer import KeysValues
from training.losses import IGNORED, itg_labels

_BATCH_SIZE = 64


@torch.inference_mode()
def caption_greedily(matcher: Matcher, image_features: Tensor, *, beginning: str = "") -> list[str]:
    """Generate captions of images [N, P, V] by greedy decoding, up to [SEP] or the last position.

    beginning: the words that every caption begins with.
    """
    start = [matcher.tokenizer.bos_token_id]
    start += matcher.tokenizer(beginning, add_special_tokens=False).input_ids
    captions: list[str] = []
    for batch in tqdm(torch.split(image_features, _BATCH_SIZE), desc="text head", mininterval=5):
        keys_values = matcher.encode_image_queries(batch).keys_values
        generated = _generate(matcher, keys_values, torch.tensor([start]).repeat(len(batch), 1))
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
            F.cross_entropy(logits.float().flatten(0, 1), row_labels, ignore_index=IGNORED, reduction="sum")
        )
    return total / int((labels != IGNORED).sum())


def _generate(matcher: Matcher, keys_values: Sequence[KeysValues], token_ids: Tensor) -> Tensor:
    """Continue token ids [count, T]; without a KV cache of the text: O(T²) per text."""
    is_ended = torch.zeros(len(token_ids), dtype=torch.bool)
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
