"""The cache of text embeddings, over a fake backend that records what it embeds."""

from collections.abc import Sequence

import torch
from torch import Tensor

from service.engine.runners.text_embedder import TextEmbedder
from tests.service.fakes import FakeBackend


class CountingBackend(FakeBackend):
    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[str]] = []

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        self.batches.append(list(texts))
        return torch.tensor([[float(text), 1.0] for text in texts])


def test_a_text_that_was_embedded_is_known_afterwards() -> None:
    embedder = CountingBackend()
    embeds = TextEmbedder(embedder, max_texts=10)
    assert embeds.get_cached(["1", "2"]) == {}
    computed = embeds.embed(["1", "2"])
    assert {text: row.tolist() for text, row in computed.items()} == {"1": [1.0, 1.0], "2": [2.0, 1.0]}
    known = embeds.get_cached(["2", "3"])
    assert {text: row.tolist() for text, row in known.items()} == {"2": [2.0, 1.0]}
    assert embedder.batches == [["1", "2"]]


def test_the_least_recently_used_text_is_forgotten_first() -> None:
    embeds = TextEmbedder(CountingBackend(), max_texts=2)
    embeds.embed(["1"])
    embeds.embed(["2"])
    embeds.get_cached(["1"])
    embeds.embed(["3"])
    assert embeds.get_cached(["1", "2", "3"]).keys() == {"1", "3"}


def test_more_texts_than_are_kept_are_still_all_given_back() -> None:
    embeds = TextEmbedder(CountingBackend(), max_texts=3)
    assert len(embeds.embed([str(number) for number in range(10)])) == 10
    assert len(embeds.get_cached([str(number) for number in range(10)])) == 3


def test_an_embedding_does_not_keep_its_batch_alive() -> None:
    computed = TextEmbedder(CountingBackend(), max_texts=3).embed(["1", "2", "3"])
    assert computed["2"].untyped_storage().nbytes() == computed["2"].nbytes
