"""Each loss compared with values computed by hand."""

from math import exp, log

import pytest
import torch

from training.losses import itc_loss, itg_labels, itg_loss, itm_loss, sample_hard_negatives


def softmax(values: list[float]) -> list[float]:
    total = sum(exp(v) for v in values)
    return [exp(v) / total for v in values]


def test_itc_is_the_mean_of_both_directions_with_smoothed_targets() -> None:
    similarities = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    rows = [softmax([2.0, 0.0]), softmax([1.0, 3.0])]
    columns = [softmax([2.0, 1.0]), softmax([0.0, 3.0])]
    # own pair 0.9 + 0.1 / 2, the other 0.1 / 2
    i2t = -sum(0.95 * log(row[k]) + 0.05 * log(row[1 - k]) for k, row in enumerate(rows)) / 2
    t2i = -sum(0.95 * log(col[k]) + 0.05 * log(col[1 - k]) for k, col in enumerate(columns)) / 2
    loss = itc_loss(similarities, torch.eye(2, dtype=torch.bool))
    assert loss.item() == pytest.approx((i2t + t2i) / 2, abs=1e-6)


def test_itc_shares_the_target_among_all_that_match() -> None:
    similarities = torch.tensor([[1.0, 1.0, -1.0]]).expand(3, 3).contiguous()
    matches = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    row, column = softmax([1.0, 1.0, -1.0]), softmax([1.0, 1.0, 1.0])
    shared = -(0.45 * log(row[0]) * 2 + 0.1 / 3 * sum(log(p) for p in row))
    single = -(0.9 * log(row[2]) + 0.1 / 3 * sum(log(p) for p in row))
    t2i = -log(column[0])  # equal similarities: any target gives log 3
    expected = ((2 * shared + single) / 3 + t2i) / 2
    assert itc_loss(similarities, matches).item() == pytest.approx(expected, abs=1e-6)


def test_itc_works_for_a_batch_of_one() -> None:
    assert itc_loss(torch.tensor([[3.0]]), torch.tensor([[True]])).item() == pytest.approx(0.0)


def test_hard_negatives_never_match_and_prefer_the_similar() -> None:
    similarities = torch.tensor([[9.0, 5.0, 0.0, 0.0], [0.0, 9.0, 9.0, 0.0], [0.0] * 4, [0.0] * 4])
    matches = torch.eye(4, dtype=torch.bool)
    matches[1, 2] = True  # text 2 is true of image 1 as well
    torch.manual_seed(0)
    drawn = [sample_hard_negatives(similarities, matches) for _ in range(300)]
    texts = torch.stack([text for text, _ in drawn])
    images = torch.stack([image for _, image in drawn])
    for index in range(4):
        assert not matches[index, texts[:, index]].any()
        assert not matches[images[:, index], index].any()
    share = (texts[:, 0] == 1).float().mean().item()
    assert share == pytest.approx(exp(5) / (exp(5) + 2), abs=0.05)


def test_negatives_are_never_an_items_own_pair_even_where_that_is_all_but_certain() -> None:
    similarities = torch.eye(5) * 1e4  # the own pair would have all the probability
    for _ in range(50):
        text, image = sample_hard_negatives(similarities, torch.eye(5, dtype=torch.bool))
        assert (text != torch.arange(5)).all()
        assert (image != torch.arange(5)).all()


def test_a_batch_of_one_has_no_negatives() -> None:
    text, image = sample_hard_negatives(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
    assert text.tolist() == image.tolist() == []
    assert itm_loss(torch.tensor([[0.0, 1.0]]), 1).item() == pytest.approx(-log(softmax([0.0, 1.0])[1]))


def test_a_row_where_everything_matches_still_gets_another_item() -> None:
    text, image = sample_hard_negatives(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))
    assert text.tolist() == image.tolist() == [1, 0]


def test_itm_is_plain_cross_entropy_with_the_positives_first() -> None:
    logits = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]])
    expected = -(log(softmax([0.0, 2.0])[1]) + log(softmax([1.0, 0.0])[0]) + log(0.5)) / 3
    assert itm_loss(logits, num_positives=1).item() == pytest.approx(expected, abs=1e-6)


def test_itg_labels_are_the_next_tokens_with_the_end_and_without_padding() -> None:
    input_ids = torch.tensor([[4, 7, 8, 3], [4, 9, 3, 0]])
    attention_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    assert itg_labels(input_ids, attention_mask).tolist() == [[7, 8, 3, -100], [9, 3, -100, -100]]


def test_itg_is_smoothed_and_ignores_padding() -> None:
    logits = torch.tensor([[[1.0, 0.0, 0.0], [9.0, 9.0, -9.0]]])
    probabilities = softmax([1.0, 0.0, 0.0])
    expected = -(0.9 * log(probabilities[1]) + 0.1 / 3 * sum(log(p) for p in probabilities))
    assert itg_loss(logits, torch.tensor([[1, -100]])).item() == pytest.approx(expected, abs=1e-6)
