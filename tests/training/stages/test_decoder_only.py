"""The objective of OPT, compared with `transformers` on one text at a time."""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import OPTForCausalLM

from training.data.batches import QaTurn
from training.stages.decoder_only import DecoderOnlyObjective, tokenize_qa_turn
from training.tiny.config import LanguageShape
from training.tiny.language import build_language_model
from training.world.qa_turns import sample_qa_turns
from training.world.scenes import iter_scenes
from training.world.vocabulary import build_language_tokenizer

TOKENIZER = build_language_tokenizer()
SHAPE = LanguageShape(32, 2, 4, 64, max_position_embeddings=128)
QUESTION = QaTurn("Question: what color is the circle ? Answer:", "red", 1.0)


@pytest.fixture(scope="module")
def llm() -> OPTForCausalLM:
    torch.manual_seed(0)
    return build_language_model(SHAPE, TOKENIZER)


def answer_loss(llm: OPTForCausalLM, prefix: Tensor, turn: QaTurn) -> tuple[Tensor, int]:
    """Compute the summed loss of an answer and its end by `transformers`, and its number of tokens."""
    prompt = TOKENIZER(turn.prompt).input_ids
    answer = [*TOKENIZER(turn.answer, add_special_tokens=False).input_ids, TOKENIZER.eos_token_id]
    ids = torch.tensor([[*prompt, *answer]])
    embeds = torch.cat([prefix[None], llm.get_input_embeddings()(ids)], dim=1)
    ignored = torch.full((1, len(prefix) + len(prompt)), -100)
    output = llm(inputs_embeds=embeds, labels=torch.cat([ignored, torch.tensor([answer])], dim=1))
    return output.loss * len(answer), len(answer)


def test_packed_turns_have_the_loss_that_transformers_computes_for_each_alone(llm: OPTForCausalLM) -> None:
    rng = np.random.default_rng(0)
    qa_turns = [sample_qa_turns(scene, rng, 3) for scene in iter_scenes(0, "train", 3)]
    prefix = torch.randn(3, 5, SHAPE.hidden_size)
    loss, weight = torch.tensor(0.0), 0.0
    for row, image_turns in enumerate(qa_turns):
        for turn in image_turns:
            summed, count = answer_loss(llm, prefix[row], turn)
            loss, weight = loss + turn.weight * summed, weight + turn.weight * count
    torch.testing.assert_close(DecoderOnlyObjective(llm, TOKENIZER).loss(prefix, qa_turns), loss / weight)


def test_the_loss_reaches_the_prefix(llm: OPTForCausalLM) -> None:
    prefix = torch.randn(1, 5, SHAPE.hidden_size, requires_grad=True)
    torch.autograd.backward(DecoderOnlyObjective(llm, TOKENIZER).loss(prefix, [[QUESTION]]))
    assert prefix.grad is not None
    assert (prefix.grad.abs().sum(dim=2) > 0).all()


def test_only_answer_and_end_are_targets() -> None:
    text = tokenize_qa_turn(QUESTION, TOKENIZER)
    targets = [token for token, weight in zip(text.token_ids, text.weights, strict=True) if weight]
    assert TOKENIZER.convert_ids_to_tokens(targets) == ["red", "\n"]


def test_words_of_a_prompt_are_weak_targets_but_never_its_first() -> None:
    text = tokenize_qa_turn(QUESTION, TOKENIZER, prompt_weight=0.05)
    words = TOKENIZER.convert_ids_to_tokens(text.token_ids)
    weights = dict(zip(words, text.weights, strict=True))
    assert words[:2] == ["</s>", "question"]
    assert (weights["</s>"], weights["question"], weights["circle"], weights["red"]) == (0.0, 0.0, 0.05, 1.0)


def test_a_caption_follows_the_begin_token_and_its_first_word_is_a_target() -> None:
    text = tokenize_qa_turn(QaTurn("", "a red circle", 0.5), TOKENIZER, prompt_weight=0.05)
    assert TOKENIZER.convert_ids_to_tokens(text.token_ids) == ["</s>", "a", "red", "circle", "\n"]
    assert text.weights == (0.0, 0.5, 0.5, 0.5, 0.5)
