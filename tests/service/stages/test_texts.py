"""The memory of text embeddings, over a fake that counts what it is asked to embed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from service.stages.texts import MAX_TEXTS_PER_BATCH, TextEmbeds


class CountingEmbedder:
    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> Tensor:
        self.batches.append(list(texts))
        return torch.tensor([[float(text), 1.0] for text in texts])


def test_embeddings_come_in_the_order_of_the_texts_with_repeats() -> None:
    embeds = TextEmbeds(CountingEmbedder(), max_texts=10)
    assert embeds(["3", "1", "3"])[:, 0].tolist() == [3.0, 1.0, 3.0]
    assert embeds(["2", "1"])[:, 0].tolist() == [2.0, 1.0]


def test_a_known_text_is_not_embedded_again() -> None:
    embedder = CountingEmbedder()
    embeds = TextEmbeds(embedder, max_texts=10)
    embeds(["1", "2", "1"])
    embeds(["2", "3"])
    assert embedder.batches == [["1", "2"], ["3"]]


def test_the_least_recently_used_text_is_forgotten_first() -> None:
    embedder = CountingEmbedder()
    embeds = TextEmbeds(embedder, max_texts=2)
    embeds(["1"])
    embeds(["2"])
    embeds(["1"])
    embeds(["3"])  # "2" leaves
    embeds(["1"])
    embeds(["2"])
    assert embedder.batches == [["1"], ["2"], ["3"], ["2"]]


def test_more_texts_than_are_kept_are_still_all_answered_in_bounded_batches() -> None:
    embedder = CountingEmbedder()
    texts = [str(number) for number in range(MAX_TEXTS_PER_BATCH + 5)]
    assert TextEmbeds(embedder, max_texts=3)(texts)[:, 0].tolist() == [float(text) for text in texts]
    assert [len(batch) for batch in embedder.batches] == [MAX_TEXTS_PER_BATCH, 5]
