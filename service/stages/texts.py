"""Contrastive embeddings of texts, kept: the same labels and queries come again with every image."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MAX_TEXTS_PER_BATCH = 64


class TextEmbeds:
    """Embeds texts that are not known yet, least recently used out first. For the engine's thread alone.

    embed: gives [M, E] for M texts. max_texts: how many are kept.
    """

    def __init__(self, embed: Callable[[Sequence[str]], Tensor], *, max_texts: int) -> None:
        self._embed = embed
        self._max_texts = max_texts
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Gives the [M, E] embeddings of M texts, in their order."""
        embeds = {text: self._known[text] for text in texts if text in self._known}
        unknown = list(dict.fromkeys(text for text in texts if text not in embeds))
        for start in range(0, len(unknown), MAX_TEXTS_PER_BATCH):
            batch = unknown[start : start + MAX_TEXTS_PER_BATCH]
            # Clones: a view would keep the whole batch alive.
            embeds |= {text: row.clone() for text, row in zip(batch, self._embed(batch), strict=True)}
        for text, row in embeds.items():
            self._known[text] = row
            self._known.move_to_end(text)
        while len(self._known) > self._max_texts:
            self._known.popitem(last=False)
        return torch.stack([embeds[text] for text in texts])
