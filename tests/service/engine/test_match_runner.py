"""Scoring of candidates, over a fake model whose cosines and matching head rank in different orders."""

import math
from collections.abc import Sequence

import pytest
from torch import Tensor

from model import EmbeddingKind
from service.engine.request import Matches, Mode, Request
from service.errors import InferenceFailedError
from tests.service.fakes import TIMEOUT_S, FakeBackend
from tests.service.running import running_engine, until


def matches_of(request: Request[Matches]) -> Matches:
    return request.future.result(TIMEOUT_S).value


def test_text_to_images_by_cosine() -> None:
    with running_engine() as harness:
        request = harness.match("100", *(harness.image(red) for red in (10, 90, 200)))
        matches = matches_of(request)
        assert [match.index for match in matches] == [1, 0, 2]
        assert matches[0].score == matches[0].itc == pytest.approx(1 - 10 / 255)
        assert matches[0].itm_probability is None
        assert harness.backend.match_batches == []


def test_image_to_texts_by_cosine() -> None:
    with running_engine() as harness:
        matches = matches_of(harness.match(harness.image(100), "10", "90", "200"))
        assert [match.index for match in matches] == [1, 0, 2]


def test_texts_to_texts_by_cosine_of_their_embeddings() -> None:
    with running_engine() as harness:
        matches = matches_of(harness.match("255", "51", "255", "102"))
        assert [match.index for match in matches] == [1, 2, 0]
        assert matches[0].score == pytest.approx(1.0)
        assert harness.backend.vision_batches == []


def test_image_to_images_by_cosine() -> None:
    with running_engine() as harness:
        matches = matches_of(
            harness.match(harness.image(100), *(harness.image(red) for red in (10, 100, 90)))
        )
        assert [match.index for match in matches] == [1, 2, 0]
        assert matches[0].score == pytest.approx(1.0)


def test_itm_scores_every_candidate_with_the_log_of_its_probability() -> None:
    with running_engine() as harness:
        matches = matches_of(harness.match("100", harness.image(10), harness.image(200), mode=Mode.ITM))
        assert [match.index for match in matches] == [1, 0]
        logit = (100 + 200) / 255
        probability = 1 / (1 + math.exp(-2 * logit))
        assert matches[0].itm_probability == pytest.approx(probability)
        assert matches[0].score == pytest.approx(math.log(probability))
        assert matches[0].itc == pytest.approx(1 - 100 / 255)


def test_rerank_adds_match_logit_and_cosine_for_the_best_by_cosine_alone() -> None:
    with running_engine() as harness:
        images = [harness.image(red) for red in (90, 200, 250, 105)]
        matches = matches_of(harness.match("100", *images, mode=Mode.RERANK, rerank_k=3))
        assert [match.index for match in matches] == [1, 3, 0]  # 250 is not among the three nearest
        assert matches[0].score == pytest.approx((100 + 200) / 255 + matches[0].itc)
        assert harness.backend.match_batches == [3]


def test_image_to_texts_is_reranked_too() -> None:
    with running_engine() as harness:
        matches = matches_of(harness.match(harness.image(100), "90", "200", mode=Mode.RERANK))
        assert [match.index for match in matches] == [1, 0]
        assert matches[1].score == pytest.approx((100 + 90) / 255 + 1 - 10 / 255)


def test_pairs_are_scored_in_bounded_chunks_between_which_others_run() -> None:
    with running_engine(started=False) as harness:
        many = harness.match(harness.image(100), *map(str, range(60)), mode=Mode.ITM)
        other = harness.match(harness.image(100), *map(str, range(40)), mode=Mode.ITM)
        harness.engine.start()
        assert len(matches_of(many)) == 60
        assert len(matches_of(other)) == 40
        assert harness.backend.match_batches == [32, 32, 32, 4]
        assert many.future.result().max_rows == 32


def test_many_texts_are_embedded_in_bounded_batches_between_which_others_run() -> None:
    with running_engine(started=False) as harness:
        numbers = [str(number) for number in range(150)]
        many = harness.match("100", *numbers)
        few = harness.match(harness.image(100), "7", "7")
        harness.engine.start()
        assert [match.index for match in matches_of(few)] == [0, 1]
        assert matches_of(many)[0].index == 149  # the fake embeddings are not of unit length
        assert harness.backend.text_batches == [64, 64, 22]


def test_texts_that_were_embedded_before_are_not_embedded_again() -> None:
    with running_engine() as harness:
        matches_of(harness.match("1", "2", "3"))
        matches_of(harness.match("3", "1", "4"))
        assert harness.backend.text_batches == [3, 1]


def test_images_are_let_go_when_their_request_is_answered() -> None:
    with running_engine() as harness:
        harness.backend.encode_gate.clear()
        request = harness.match("100", harness.image(90), harness.image(91), mode=Mode.ITM)
        until(lambda: harness.engine.num_images == 2)
        harness.backend.encode_gate.set()
        matches_of(request)
        until(lambda: harness.engine.num_images == 0)


def test_only_the_best_are_returned_and_equal_scores_keep_their_order() -> None:
    with running_engine() as harness:
        matches = matches_of(
            harness.match("100", *(harness.image(red) for red in (90, 100, 110, 50)), top_k=3)
        )
        assert [match.index for match in matches] == [1, 0, 2]


def test_the_same_image_may_be_a_candidate_twice_and_is_encoded_once() -> None:
    with running_engine() as harness:
        matches = matches_of(harness.match("100", harness.image(90), harness.image(90)))
        assert [match.index for match in matches] == [0, 1]
        assert harness.backend.vision_batches == [[90]]


def test_image_features_are_kept_only_where_the_matching_head_needs_them() -> None:
    with running_engine() as harness:
        matches_of(harness.match("100", harness.image(90)))
        assert harness.memory.get("digest-90", EmbeddingKind.IMAGE_FEATURES) is None
        matches_of(harness.match("100", harness.image(91), mode=Mode.ITM))
        assert harness.memory.get("digest-91", EmbeddingKind.IMAGE_FEATURES) is not None
        assert harness.memory.get("digest-91", EmbeddingKind.IMAGE_EMBEDS) is not None


def test_a_score_that_is_not_a_number_is_no_answer() -> None:
    with running_engine() as harness, pytest.raises(InferenceFailedError):
        matches_of(harness.match("nan", harness.image(90)))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("broken", ["a logit of no match", "a logit of a match", "one cosine of many"])
@pytest.mark.parametrize("mode", list(Mode))
def test_no_answer_holds_a_number_that_is_not_finite(mode: Mode, broken: str, number: float) -> None:
    """One value of one candidate; of cosines, that of a candidate that the matching head would not score."""

    class Broken(FakeBackend):
        def similarities(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
            cosines = super().similarities(image_embeds, text_embeds)
            if broken == "one cosine of many" and len(cosines) == 4:
                cosines[2] = number
            return cosines

        def match_logits(self, image_features: Tensor, texts: Sequence[str]) -> Tensor:
            logits = super().match_logits(image_features, texts)
            if "logit" in broken:
                logits[0, 0 if broken == "a logit of no match" else 1] = number
            return logits

    with running_engine(Broken()) as harness:
        images = [harness.image(red) for red in (90, 100, 110, 120)]
        request = harness.match("100", *images, mode=mode, rerank_k=2, top_k=2)
        if mode is Mode.ITC and "logit" in broken:
            assert len(matches_of(request)) == 2
        else:
            assert isinstance(request.future.exception(TIMEOUT_S), InferenceFailedError)
        assert len(matches_of(harness.match("100", harness.image(90), mode=Mode.ITC))) == 1
