"""The objective of T5, compared with `transformers` on one text at a time."""

import numpy as np
import pytest
import torch
from transformers import T5ForConditionalGeneration

from training.data.batches import QaTurn
from training.stages.encoder_decoder import EncoderDecoderObjective, group_by_length, split_captions
from training.tiny.config import EncoderDecoderShape
from training.tiny.language_t5 import build_encoder_decoder
from training.world.qa_turns import sample_qa_turns
from training.world.scenes import iter_scenes
from training.world.vocabulary import build_encoder_decoder_tokenizer

TOKENIZER = build_encoder_decoder_tokenizer()
SHAPE = EncoderDecoderShape(32, 2, 2, 4, 64)


@pytest.fixture(scope="module")
def llm() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return build_encoder_decoder(SHAPE, TOKENIZER)


def test_turns_together_have_the_loss_that_transformers_computes_for_each_alone(
    llm: T5ForConditionalGeneration,
) -> None:
    rng = np.random.default_rng(0)
    qa_turns = [sample_qa_turns(scene, rng, 3) for scene in iter_scenes(0, "train", 3)]
    prefix = torch.randn(3, 5, SHAPE.hidden_size)
    torch.manual_seed(1)
    together = EncoderDecoderObjective(llm, TOKENIZER).loss(prefix, qa_turns)
    torch.manual_seed(1)
    loss, weight = torch.tensor(0.0), 0.0
    for image, turn in split_captions(qa_turns):
        prompt = torch.tensor([TOKENIZER(turn.prompt).input_ids])
        answer = torch.tensor([TOKENIZER(turn.answer).input_ids])
        embeds = torch.cat([prefix[image][None], llm.get_input_embeddings()(prompt)], dim=1)
        summed = llm(inputs_embeds=embeds, labels=answer).loss * answer.numel()
        loss, weight = loss + turn.weight * summed, weight + turn.weight * answer.numel()
    torch.testing.assert_close(together, loss / weight)


def test_half_of_the_captions_are_split_and_nothing_else_is() -> None:
    caption, question = QaTurn("", "a red circle and a blue star", 0.5), QaTurn("how many ?", "two", 1.0)
    torch.manual_seed(0)
    pairs = split_captions([[caption, question]] * 400)
    captions, questions = [item for _, item in pairs[::2]], [item for _, item in pairs[1::2]]
    assert questions == [question] * 400
    assert {f"{item.prompt} {item.answer}".strip() for item in captions} == {caption.answer}
    assert all(item.answer for item in captions)
    assert 140 < sum(bool(item.prompt) for item in captions) < 220
    assert [image for image, _ in pairs] == [k for k in range(400) for _ in range(2)]


def test_grouping_by_length_keeps_every_turn_once() -> None:
    long, short = QaTurn("", "a b c d e f g", 1.0), QaTurn("", "a", 1.0)
    assert group_by_length([(0, long), (0, short), (1, short)]) == [[(0, long)], [(0, short), (1, short)]]
    assert group_by_length([(0, short)]) == [[(0, short)]]
