"""The losses of both stages and the sampling of hard negatives: pure functions (BLIP-2, §3.2; as in LAVIS).

`matches` [B, B] is true at (i, j) if text j is true of image i. It is the identity where only the pairing is
known. Where images recur or truth can be checked, other entries are true too; they are never negatives.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

LABEL_SMOOTHING = 0.1
IGNORED = -100


def itc_loss(similarities: Tensor, matches: Tensor) -> Tensor:
    """Compute the image-text contrastive loss of [B, B] similarities, already divided by the temperature.

    Mean of image-to-text (rows) and text-to-image (columns). The targets put 1 - 0.1 evenly on the matches
    and 0.1 evenly on all; with the identity as `matches` this is cross-entropy with label smoothing.
    """
    return 0.5 * (_soft_cross_entropy(similarities, matches) + _soft_cross_entropy(similarities.T, matches.T))


def sample_hard_negatives(similarities: Tensor, matches: Tensor) -> tuple[Tensor, Tensor]:
    """Sample a negative text for each image and a negative image for each text, by softmax of similarity.

    `similarities` [B, B] as in `itc_loss`. Returns (text index per image [B], image index per text [B]). A
    row without negatives samples from all but its own pair. A batch of one has none: both are empty.
    """
    if len(similarities) == 1:
        none = torch.empty(0, dtype=torch.long, device=similarities.device)
        return none, none
    with torch.no_grad():
        return _sample_negatives(similarities, matches), _sample_negatives(similarities.T, matches.T)


def itm_loss(logits: Tensor, num_positives: int) -> Tensor:
    """Compute the image-text matching loss of [K, 2] logits; the first `num_positives` pairs match.

    Each matched pair has a wrong image and a wrong text, K = 3B, but in a batch of one, K = 1.
    """
    labels = (torch.arange(len(logits), device=logits.device) < num_positives).long()
    return F.cross_entropy(logits.float(), labels)


def itg_labels(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the next-token labels [B, T] of padded texts: the end token is a target, padding is not."""
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, :-1] = torch.where(attention_mask[:, 1:].bool(), input_ids[:, 1:], IGNORED)
    return labels


def itg_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the image-grounded text generation loss of [.., N] logits and [..] labels.

    Cross-entropy with label smoothing, mean over the targets.
    """
    return F.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED, label_smoothing=LABEL_SMOOTHING
    )


def _soft_cross_entropy(similarities: Tensor, matches: Tensor) -> Tensor:
    weights = matches.float()
    targets = (1 - LABEL_SMOOTHING) * weights / weights.sum(dim=1, keepdim=True) + LABEL_SMOOTHING / len(
        weights
    )
    return -(targets * similarities.float().log_softmax(dim=1)).sum(dim=1).mean()


def _sample_negatives(similarities: Tensor, matches: Tensor) -> Tensor:
    diagonal = torch.eye(len(matches), dtype=torch.bool, device=matches.device)
    excluded = torch.where(matches.all(dim=1, keepdim=True), diagonal, matches)
    weights = similarities.float().masked_fill(excluded, float("-inf")).softmax(dim=1)
    return torch.multinomial(weights, 1).squeeze(1)
