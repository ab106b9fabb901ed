"""T5 as stage 2 and pre-training see it, beside `transformers` on one text at a time."""

import numpy as np
import pytest
import torch
from transformers import T5ForConditionalGeneration

from training.config import EncoderDecoderShape
from training.tiny.language_t5 import T5Reader, build_encoder_decoder, group_by_length, split_captions
from training.world.qa_turns import Exchange, sample_exchanges
from training.world.scenes import iter_scenes
from training.world.vocabulary import build_encoder_decoder_tokenizer

TOKENIZER = build_encoder_decoder_tokenizer()
SHAPE = EncoderDecoderShape(32, 2, 2, 4, 64)


@pytest.fixture(scope="module")
def llm() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return build_encoder_decoder(SHAPE, TOKENIZER)


def test_exchanges_together_cost_what_transformers_says_of_each_alone(
    llm: T5ForConditionalGeneration,
) -> None:
    rng = np.random.default_rng(0)
    exchanges = [sample_exchanges(scene, rng, 3) for scene in iter_scenes(0, "train", 3)]
    prefix = torch.randn(3, 5, SHAPE.hidden_size)
    torch.manual_seed(1)
    together = T5Reader(llm, TOKENIZER).loss(prefix, exchanges)
    torch.manual_seed(1)
    loss, weight = torch.tensor(0.0), 0.0
    for image, exchange in split_captions(exchanges):
        prompt = torch.tensor([TOKENIZER(exchange.prompt).input_ids])
        answer = torch.tensor([TOKENIZER(exchange.answer).input_ids])
        embeds = torch.cat([prefix[image][None], llm.get_input_embeddings()(prompt)], dim=1)
        summed = llm(inputs_embeds=embeds, labels=answer).loss * answer.numel()
        loss, weight = loss + exchange.weight * summed, weight + exchange.weight * answer.numel()
    torch.testing.assert_close(together, loss / weight)


def test_prompt_and_answer_end_with_the_end_token_and_the_answer_begins_with_padding(
    llm: T5ForConditionalGeneration,
) -> None:
    assert TOKENIZER.convert_ids_to_tokens(TOKENIZER("a red").input_ids) == ["a", "red", "</s>"]
    assert llm.config.decoder_start_token_id == TOKENIZER.pad_token_id
    assert llm.config.eos_token_id == TOKENIZER.eos_token_id


def test_half_of_the_captions_are_split_and_nothing_else_is() -> None:
    caption, question = Exchange("", "a red circle and a blue star", 0.5), Exchange("how many ?", "two", 1.0)
    torch.manual_seed(0)
    pairs = split_captions([[caption, question]] * 400)
    captions, questions = [item for _, item in pairs[::2]], [item for _, item in pairs[1::2]]
    assert questions == [question] * 400
    assert {f"{item.prompt} {item.answer}".strip() for item in captions} == {caption.answer}
    assert all(item.answer for item in captions)
    assert 140 < sum(bool(item.prompt) for item in captions) < 220
    assert [image for image, _ in pairs] == [k for k in range(400) for _ in range(2)]


def test_grouping_by_length_keeps_every_exchange_once() -> None:
    long, short = Exchange("", "a b c d e f g", 1.0), Exchange("", "a", 1.0)
    assert group_by_length([(0, long), (0, short), (1, short)]) == [[(0, long)], [(0, short), (1, short)]]
    assert group_by_length([(0, short)]) == [[(0, short)]]
