import torch

from training.data.packing import WeightedText, pack_texts, packed_attention_mask, text_starts


def test_texts_are_laid_one_after_the_other_with_labels_inside_each() -> None:
    texts = [WeightedText((2, 7, 8), (0.0, 0.5, 1.0)), WeightedText((2, 9), (0.0, 1.0))]
    batch = pack_texts([texts, texts[1:]], prefix_length=4, pad_token_id=1)
    assert batch.input_ids.tolist() == [[2, 7, 8, 2, 9], [2, 9, 1, 1, 1]]
    assert batch.position_ids[0].tolist() == [4, 5, 6, 4, 5]
    assert batch.kept_columns.tolist() == [4, 5, 7]
    targets = zip(batch.target_rows, batch.kept_columns[batch.target_columns], batch.labels, strict=True)
    assert [tuple(map(int, target)) for target in targets] == [(0, 4, 7), (0, 5, 8), (0, 7, 9), (1, 4, 9)]
    assert batch.weights.tolist() == [0.5, 1.0, 1.0, 1.0]
    assert text_starts(texts, prefix_length=4) == [4, 7]


def test_the_first_tokens_of_texts_are_predicted_from_the_last_of_the_prefix() -> None:
    texts = [WeightedText((7, 8), (0.5, 1.0)), WeightedText((9,), (1.0,))]
    batch = pack_texts([texts], prefix_length=4, pad_token_id=1)
    assert batch.kept_columns.tolist() == [3, 4]
    assert batch.kept_columns[batch.target_columns].tolist() == [3, 4, 3]
    assert batch.labels.tolist() == [7, 8, 9]


def test_a_text_attends_to_the_prefix_and_its_own_past_only() -> None:
    visible = (
        packed_attention_mask(torch.tensor([[0, 0, 1, -1]]), prefix_length=1, dtype=torch.float32)[0, 0] == 0
    )
    assert visible.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [1, 0, 0, 0, 1],
    ]
