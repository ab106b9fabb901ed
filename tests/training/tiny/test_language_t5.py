import pytest
import torch
from transformers import T5ForConditionalGeneration

from training.tiny.config import EncoderDecoderShape
from training.tiny.language_t5 import build_encoder_decoder
from training.world.vocabulary import build_encoder_decoder_tokenizer

TOKENIZER = build_encoder_decoder_tokenizer()
SHAPE = EncoderDecoderShape(32, 2, 2, 4, 64)


@pytest.fixture(scope="module")
def llm() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return build_encoder_decoder(SHAPE, TOKENIZER)


def test_prompt_and_answer_end_with_the_end_token_and_the_answer_begins_with_padding(
    llm: T5ForConditionalGeneration,
) -> None:
    assert TOKENIZER.convert_ids_to_tokens(TOKENIZER("a red").input_ids) == ["a", "red", "</s>"]
    assert llm.config.decoder_start_token_id == TOKENIZER.pad_token_id
    assert llm.config.eos_token_id == TOKENIZER.eos_token_id
