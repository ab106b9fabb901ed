"""The objective of encoder-decoders, compared with `transformers` on one text at a time."""

from dataclasses import fields
from math import log

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, MT5Config, MT5ForConditionalGeneration

from model.language import LanguageModel
from tests.builders import WORDS, build_language_tokenizer
from training.data.batches import QaTurn
from training.stages.encoder_decoder import (
    EncodedTurns,
    group_by_length,
    mean_loss,
    split_captions,
    weighted_loss,
)
from training.stages.stage2 import build_objective
from training.stages.turn_tokenizer import TurnTokenizer
from training.tiny.config import EncoderDecoderShape
from training.tiny.language_t5 import build_encoder_decoder
from training.world.vocabulary import build_encoder_decoder_tokenizer

SHAPE = EncoderDecoderShape(32, 2, 2, 4, 64)
TURNS = [
    [QaTurn("", "a red circle above a blue star", 0.5), QaTurn("what color is the circle ?", "red", 1.0)],
    [QaTurn("how many ?", "two", 1.0)],
]


def build_model(name: str) -> LanguageModel:
    torch.manual_seed(0)
    if name == "t5":
        tokenizer = build_encoder_decoder_tokenizer()
        return LanguageModel(build_encoder_decoder(SHAPE, tokenizer).eval(), tokenizer)
    sizes = {"vocab_size": len(WORDS) + 5, "d_model": 32, "eos_token_id": 3, "pad_token_id": 1}
    if name == "bart":
        layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        bart = BartConfig(**sizes, **layers, **heads, decoder_start_token_id=3, init_std=0.2)
        return LanguageModel(BartForConditionalGeneration(bart).eval(), build_language_tokenizer())
    mt5 = MT5Config(**sizes, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=1)
    return LanguageModel(MT5ForConditionalGeneration(mt5).eval(), build_language_tokenizer())


@pytest.mark.parametrize("name", ["t5", "mt5", "bart"])
def test_turns_together_have_the_loss_that_transformers_computes_for_each_alone(name: str) -> None:
    language_model = build_model(name)
    tokenizer = TurnTokenizer(language_model)
    prefix = torch.randn(2, 5, 32)
    torch.manual_seed(1)
    together = build_objective(language_model).loss(prefix, TURNS)
    torch.manual_seed(1)
    loss, weight = torch.tensor(0.0), 0.0
    for image, turn in split_captions(TURNS):
        answer = torch.tensor([tokenizer.answer_ids(turn.answer, max_tokens=99)])
        embeds = language_model.embed_prefix(prefix[image], language_model.tokenize(turn.prompt))[None]
        summed = language_model.llm(inputs_embeds=embeds, labels=answer).loss * answer.numel()
        loss, weight = loss + turn.weight * summed, weight + turn.weight * answer.numel()
    torch.testing.assert_close(together, loss / weight)


def test_the_mean_is_over_weighted_tokens_of_all_groups() -> None:
    """Two answers of probabilities 1/2 and 1/4 (weight 1), and 1/8 (weight .5): 4.5 log 2 over weight 2.5."""
    labels = torch.tensor([[0, 1], [0, -100]])
    chances = torch.tensor([[[1 / 2, 1 / 2], [3 / 4, 1 / 4]], [[1 / 8, 7 / 8], [0.5, 0.5]]])
    ids, weights = torch.zeros(2, 2, dtype=torch.long), torch.tensor([[1.0, 1.0], [0.5, 0.0]])
    encoded = EncodedTurns(torch.tensor([0, 1]), ids, ids, ids, labels, weights)
    first, second = (replace_rows(encoded, row) for row in range(2))
    for groups in ([(chances, encoded)], [(chances[:1], first), (chances[1:], second)]):
        loss = mean_loss([weighted_loss(chance.log(), turns) for chance, turns in groups])
        assert loss.item() == pytest.approx((1 + 2 + 0.5 * 3) * log(2) / 2.5)


def replace_rows(encoded: EncodedTurns, row: int) -> EncodedTurns:
    return EncodedTurns(*(getattr(encoded, field.name)[row : row + 1] for field in fields(encoded)))


def test_captions_are_split_from_the_first_word_up_to_the_midpoint() -> None:
    """Seven words: the prompt has 1, 2 or 3, each in a third of the splits; questions stay as they are."""
    caption, question = QaTurn("", "one two three four five six seven", 0.5), QaTurn("how many ?", "two", 1.0)
    torch.manual_seed(0)
    pairs = split_captions([[caption, question]] * 600, whole_share=0.0)
    captions, questions = [item for _, item in pairs[::2]], [item for _, item in pairs[1::2]]
    assert questions == [question] * 600
    assert {f"{item.prompt} {item.answer}" for item in captions} == {caption.answer}
    lengths = [len(item.prompt.split()) for item in captions]
    assert set(lengths) == {1, 2, 3}
    assert all(150 < lengths.count(length) < 250 for length in (1, 2, 3))
    assert [image for image, _ in pairs] == [k for k in range(600) for _ in range(2)]


@pytest.mark.parametrize(
    ("answer", "prompts"), [("one", {""}), ("one two", {"one"}), ("a b c", {"a"}), ("", {""})]
)
def test_short_captions_are_split_at_their_midpoint_or_stay_whole(answer: str, prompts: set[str]) -> None:
    pairs = split_captions([[QaTurn("", answer, 1.0)]] * 50, whole_share=0.0)
    assert {item.prompt for _, item in pairs} == prompts


def test_half_of_the_captions_stay_whole() -> None:
    torch.manual_seed(0)
    pairs = split_captions([[QaTurn("", "a red circle", 0.5)]] * 400)
    assert 160 < sum(not item.prompt for _, item in pairs) < 240


def test_an_answer_that_is_cut_keeps_its_end() -> None:
    language_model = build_model("t5")
    tokenizer = TurnTokenizer(language_model)
    whole = tokenizer.answer_ids("a red circle", max_tokens=4)
    assert len(whole) == 4
    assert tokenizer.answer_ids("a red circle", max_tokens=3) == (*whole[:2], language_model.eos_token_ids[0])


def test_a_loss_of_the_prefix_reaches_it_through_the_encoder() -> None:
    prefix = torch.randn(2, 5, 32, requires_grad=True)
    torch.autograd.backward(build_objective(build_model("t5")).loss(prefix, TURNS))
    assert prefix.grad is not None
    assert (prefix.grad.abs().sum(dim=2) > 0).all()


def test_grouping_by_length_keeps_every_turn_once() -> None:
    long, short = QaTurn("", "a b c d e f g", 1.0), QaTurn("", "a", 1.0)
    assert group_by_length([(0, long), (0, short), (1, short)]) == [[(0, long)], [(0, short), (1, short)]]
    assert group_by_length([(0, short)]) == [[(0, short)]]
