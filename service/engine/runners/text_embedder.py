"""Embeds texts, and keeps what it embedded."""

from collections.abc import Iterable, Sequence
from typing import Final

from cachetools import LRUCache
from torch import Tensor

from service.model_backend import Backend

MAX_TEXTS_KEPT: Final = 8192  # a kilobyte each


class TextEmbedder:
    """Embeds texts and keeps the results: the same labels and queries come again with every image.

    max_texts: how many are kept, least recently used out first. For the engine's thread alone.
    """

    def __init__(self, backend: Backend, *, max_texts: int = MAX_TEXTS_KEPT) -> None:
        self._backend = backend
        self._known: LRUCache[str, Tensor] = LRUCache(max_texts)

    def get_cached(self, texts: Iterable[str]) -> dict[str, Tensor]:
        """Return the [E] embedding of each text that is known; counts as a use."""
        return {text: self._known[text] for text in texts if text in self._known}

    def embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Embed texts in one batch, and keep the results."""
        rows = self._backend.embed_texts(texts)  # [M, E]
        embeds = {
            text: row.clone() for text, row in zip(texts, rows, strict=True)
        }  # a view would keep all rows
        self._known.update(embeds)
        return embeds
