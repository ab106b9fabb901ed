import torch

from training.config import LanguageShape
from training.language import build_language_model, caption_text, packed_lm_loss, question_text
from training.packing import Text, pack_texts, packed_mask
from training.scene_text import Question
from training.vocabulary import build_language_tokenizer

SHAPE = LanguageShape(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=64,
)


def test_texts_are_laid_one_after_the_other_with_labels_inside_each() -> None:
    texts = [Text((2, 7, 8), (0.0, 0.5, 1.0)), Text((2, 9), (0.0, 1.0))]
    packed = pack_texts([texts, texts[1:]], prefix_length=4, pad_token_id=1)
    assert packed.input_ids.tolist() == [[2, 7, 8, 2, 9], [2, 9, 1, 1, 1]]
    assert packed.position_ids[0].tolist() == [4, 5, 6, 4, 5]
    assert packed.labels.tolist() == [[7, 8, -100, 9, -100], [9, -100, -100, -100, -100]]
    assert packed.weights.tolist() == [[0.5, 1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]]


def test_a_text_sees_the_prefix_and_its_own_past_only() -> None:
    visible = packed_mask(torch.tensor([[0, 0, 1, -1]]), prefix_length=1, dtype=torch.float32)[0, 0] == 0
    assert visible.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [1, 0, 0, 0, 1],
    ]


def test_packed_texts_cost_what_each_costs_alone() -> None:
    torch.manual_seed(0)
    tokenizer = build_language_tokenizer()
    llm = build_language_model(SHAPE, tokenizer)
    prefix = torch.randn(1, 5, 16)
    texts = [
        caption_text("a red circle on a white background", tokenizer),
        question_text(Question("color", "what color is the circle ?", "red"), tokenizer),
        question_text(Question("count", "how many objects are there ?", "two"), tokenizer, 0.05),
    ]
    together = packed_lm_loss(llm, prefix, pack_texts([texts], 5, tokenizer.pad_token_id))
    alone = [packed_lm_loss(llm, prefix, pack_texts([[text]], 5, tokenizer.pad_token_id)) for text in texts]
    weights = [sum(text.weights) for text in texts]
    expected = sum(loss * weight for loss, weight in zip(alone, weights, strict=True)) / sum(weights)
    torch.testing.assert_close(together, expected)


def test_only_answer_and_end_are_targets_of_a_question() -> None:
    tokenizer = build_language_tokenizer()
    text = question_text(Question("color", "what color is the circle ?", "red"), tokenizer)
    targets = [token for token, weight in zip(text.token_ids, text.weights, strict=True) if weight]
    assert tokenizer.convert_ids_to_tokens(targets) == ["red", "\n"]
