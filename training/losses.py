"""The losses of both stages, as pure functions of scores and labels (BLIP-2, §3.2; LAVIS for the details).

`matches` [B, B] says which text belongs to which image: entry (i, j) is true where text j is true of image i.
Where nothing but the pairing is known it is the identity; where images recur (retrieval fine-tuning) or
truth can be checked, the other true entries are neither negatives nor wrong.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

LABEL_SMOOTHING = 0.1
IGNORED = -100


def itc_loss(similarities: Tensor, matches: Tensor) -> Tensor:
    """Image-text contrastive loss of [B, B] similarities, already divided by the temperature.

    Half image-to-text (rows), half text-to-image (columns). Targets share 1 - 0.1 evenly among what matches
    and 0.1 evenly among all; with the identity as `matches` this is cross-entropy with label smoothing.
    """
    return 0.5 * (_soft_cross_entropy(similarities, matches) + _soft_cross_entropy(similarities.T, matches.T))


def sample_hard_negatives(similarities: Tensor, matches: Tensor) -> tuple[Tensor, Tensor]:
    """Draws a wrong text for each image and a wrong image for each text, likelier the more similar.

    `similarities` [B, B] as in `itc_loss`. Returns (text of each image [B], image of each text [B]). A row
    without any wrong partner draws from the others by similarity alone.
    """
    with torch.no_grad():
        return _draw(similarities, matches), _draw(similarities.T, matches.T)


def itm_loss(logits: Tensor, num_positives: int) -> Tensor:
    """Image-text matching loss of [3B, 2] logits whose first `num_positives` = B pairs belong together."""
    labels = (torch.arange(len(logits), device=logits.device) < num_positives).long()
    return F.cross_entropy(logits.float(), labels)


def itg_labels(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Next-token labels [B, T] of padded texts: the end token is a target, padding is not."""
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, :-1] = torch.where(attention_mask[:, 1:].bool(), input_ids[:, 1:], IGNORED)
    return labels


def itg_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Image-grounded text generation loss of [B, T, N] logits: smoothed cross-entropy, mean over targets."""
    return F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, label_smoothing=LABEL_SMOOTHING
    )


def _soft_cross_entropy(similarities: Tensor, matches: Tensor) -> Tensor:
    weights = matches.float()
    targets = (1 - LABEL_SMOOTHING) * weights / weights.sum(dim=1, keepdim=True) + LABEL_SMOOTHING / len(
        weights
    )
    return -(targets * similarities.float().log_softmax(dim=1)).sum(dim=1).mean()


def _draw(similarities: Tensor, matches: Tensor) -> Tensor:
    own = torch.eye(len(matches), dtype=torch.bool, device=matches.device)
    forbidden = torch.where(matches.all(dim=1, keepdim=True), own, matches)
    weights = similarities.float().masked_fill(forbidden, float("-inf")).softmax(dim=1)
    return torch.multinomial(weights, 1).squeeze(1)
