"""Contrastive embeddings of texts, kept: the same labels and queries come again with every image."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor


class TextEmbeds:
    """Least recently used out first. For the engine's thread alone.

    embed: gives [M, E] for M texts. max_texts: how many are kept.
    """

    def __init__(self, embed: Callable[[Sequence[str]], Tensor], *, max_texts: int) -> None:
        self._embed = embed
        self._max_texts = max_texts
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    def recall(self, texts: Iterable[str]) -> dict[str, Tensor]:
        """Gives the [E] embedding of each text that is known; counts as a use."""
        known = {text: self._known[text] for text in texts if text in self._known}
        for text in known:
            self._known.move_to_end(text)
        return known

    def embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Embeds texts in one batch, and keeps what comes out."""
        # Clones: a view would keep the whole batch alive.
        fresh = {text: row.clone() for text, row in zip(texts, self._embed(texts), strict=True)}
        self._known |= fresh
        while len(self._known) > self._max_texts:
            self._known.popitem(last=False)
        return fresh
