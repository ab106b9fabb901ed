"""How many image features a match request holds: those of its best candidates, and of one batch."""

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from model import EmbeddingKind
from service.engine.image_pool import ImageInput
from service.engine.request import MAX_PAIRS_PER_STEP, Match, Mode
from service.engine.scheduler import MAX_IMAGES_PER_STEP
from service.model_backend import EncoderId
from tests.service.fakes import TIMEOUT_S, FakeBackend, pixels
from tests.service.running import EngineHarness, running_engine, text_of, until

NUM_IMAGES = 200
RERANK_K = 10


class CountedFeatures(Tensor):
    """Features whose clones, one for each image, are counted while they live."""

    clones: list["weakref.ref[Tensor]"] = []  # noqa: RUF012 - a tensor has no constructor of its own

    def clone(self, **options: Any) -> Tensor:
        copy: Tensor = super().clone(**options)
        self.clones.append(weakref.ref(copy))
        return copy


class CountingBackend(FakeBackend):
    """Records the most features that live when something is computed."""

    def __init__(self) -> None:
        super().__init__()
        CountedFeatures.clones.clear()
        self.max_live = 0

    def encode_images(self, pixels: Tensor, encoder: EncoderId) -> Tensor:
        self.count()
        return super().encode_images(pixels, encoder).as_subclass(CountedFeatures)

    def encode(self, kind: EmbeddingKind, image_features: Tensor) -> Tensor:
        return super().encode(kind, image_features.as_subclass(Tensor))

    def similarities(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        self.count()
        return super().similarities(image_embeds, text_embeds)

    def match_logits(self, image_features: Tensor, texts: Sequence[str]) -> Tensor:
        self.count()
        return super().match_logits(image_features.as_subclass(Tensor), texts)

    def count(self) -> None:
        self.max_live = max(self.max_live, sum(clone() is not None for clone in CountedFeatures.clones))


def images(count: int = NUM_IMAGES) -> list[ImageInput]:
    return [ImageInput(f"digest-{index}", pixels(20 + index), {}) for index in range(count)]


def best(harness: EngineHarness, mode: Mode, rerank_k: int, candidates: Sequence[ImageInput]) -> list[Match]:
    request = harness.match("120", *candidates, mode=mode, rerank_k=rerank_k)
    return list(request.future.result(TIMEOUT_S).value)


def test_reranking_holds_the_features_of_the_best_and_of_one_batch() -> None:
    backend = CountingBackend()
    with running_engine(backend, cache_bytes=0) as harness:
        matches = best(harness, Mode.RERANK, RERANK_K, images())
        assert len(matches) == RERANK_K
        assert max(abs(match.index - 100) for match in matches) == 5  # image 100 is nearest to the query
        assert backend.max_live <= RERANK_K + MAX_IMAGES_PER_STEP
        assert sum(map(len, backend.vision_batches)) == NUM_IMAGES  # each is encoded once
        until(lambda: harness.engine.num_images == 0)
        backend.max_live = 0
        backend.count()
        assert backend.max_live == 0


def test_reranking_of_all_holds_all_and_of_one_holds_one() -> None:
    for rerank_k in (1, NUM_IMAGES - 1, NUM_IMAGES):
        backend = CountingBackend()
        with running_engine(backend, cache_bytes=0) as harness:
            assert len(best(harness, Mode.RERANK, rerank_k, images())) == min(rerank_k, 100)
            assert backend.max_live <= rerank_k + MAX_IMAGES_PER_STEP


def test_scoring_every_pair_holds_the_features_of_a_batch_of_pairs() -> None:
    backend = CountingBackend()
    with running_engine(backend, cache_bytes=0) as harness:
        assert len(best(harness, Mode.ITM, 1, images())) == 100
        assert backend.max_live <= MAX_PAIRS_PER_STEP + MAX_IMAGES_PER_STEP
        assert sum(map(len, backend.vision_batches)) == NUM_IMAGES
        assert sum(backend.match_batches) == NUM_IMAGES


def test_cosines_hold_no_features() -> None:
    backend = CountingBackend()
    with running_engine(backend, cache_bytes=0) as harness:
        assert len(best(harness, Mode.ITC, 1, images())) == 100
        assert backend.max_live <= MAX_IMAGES_PER_STEP


@pytest.mark.parametrize("mode", [Mode.RERANK, Mode.ITM])
def test_images_of_two_requests_at_once_are_ranked_for_each(mode: Mode) -> None:
    with running_engine(cache_bytes=0, started=False) as harness:
        shared = images(60)
        first = harness.match("40", *shared, mode=mode, rerank_k=5)
        second = harness.match("70", *reversed(shared), mode=mode, rerank_k=5)
        caption = harness.caption(0, "a", image=shared[3])
        harness.engine.start()
        together = [list(each.future.result(TIMEOUT_S).value) for each in (first, second)]
        assert text_of(caption) == "23 a #0"
    with running_engine(cache_bytes=0) as harness:
        later = [
            harness.match("40", *images(60), mode=mode, rerank_k=5),
            harness.match("70", *reversed(images(60)), mode=mode, rerank_k=5),
        ]
        alone = [list(each.future.result(TIMEOUT_S).value) for each in later]
    assert together == alone


def test_the_same_image_twice_among_the_candidates_is_scored_twice() -> None:
    with running_engine(cache_bytes=0) as harness:
        twice = [*images(20), *images(20)]
        for mode in (Mode.RERANK, Mode.ITM):
            matches = best(harness, mode, 12, twice)
            assert len(matches) == (12 if mode is Mode.RERANK else 40)
            assert len({match.index for match in matches}) == len(matches)


def test_an_image_whose_embedding_is_cached_is_encoded_only_if_it_is_among_the_best() -> None:
    with running_engine() as harness:
        best(harness, Mode.ITC, 1, images(40))  # caches the embeddings alone
        harness.backend.vision_batches.clear()
        matches = best(harness, Mode.RERANK, 5, images(40))
        assert len(matches) == 5
        assert sum(map(len, harness.backend.vision_batches)) == 5
        harness.backend.vision_batches.clear()
        assert best(harness, Mode.RERANK, 5, images(40)) == matches


def test_features_that_are_not_numbers_fail_the_request_alone() -> None:
    class Broken(FakeBackend):
        def similarities(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
            return super().similarities(image_embeds, text_embeds) * torch.nan

    with running_engine(Broken(), started=False) as harness:
        request = harness.match("1", *images(30), mode=Mode.RERANK, rerank_k=3)
        caption = harness.caption(200, "a")
        harness.engine.start()
        assert request.future.exception(TIMEOUT_S) is not None
        assert text_of(caption) == "200 a #0"
