"""OPT as stage 2 and pre-training see it, beside `transformers` on one text at a time."""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import OPTForCausalLM

from training.config import LanguageShape
from training.tiny.language import OptReader, build_language_model, embed_descriptions, to_text
from training.world.captions import GRID
from training.world.qa_turns import Exchange, sample_exchanges
from training.world.scenes import iter_scenes
from training.world.vocabulary import build_language_tokenizer

TOKENIZER = build_language_tokenizer()
SHAPE = LanguageShape(32, 2, 4, 64, max_position_embeddings=128)
QUESTION = Exchange("Question: what color is the circle ? Answer:", "red", 1.0)


@pytest.fixture(scope="module")
def llm() -> OPTForCausalLM:
    torch.manual_seed(0)
    return build_language_model(SHAPE, TOKENIZER)


def answer_loss(llm: OPTForCausalLM, prefix: Tensor, exchange: Exchange) -> tuple[Tensor, int]:
    """The loss of an answer and its end by `transformers`, summed, and how many tokens that is."""
    prompt = TOKENIZER(exchange.prompt).input_ids
    answer = [*TOKENIZER(exchange.answer, add_special_tokens=False).input_ids, TOKENIZER.eos_token_id]
    ids = torch.tensor([[*prompt, *answer]])
    embeds = torch.cat([prefix[None], llm.get_input_embeddings()(ids)], dim=1)
    ignored = torch.full((1, len(prefix) + len(prompt)), -100)
    output = llm(inputs_embeds=embeds, labels=torch.cat([ignored, torch.tensor([answer])], dim=1))
    return output.loss * len(answer), len(answer)


def test_packed_exchanges_cost_what_transformers_says_of_each_alone(llm: OPTForCausalLM) -> None:
    rng = np.random.default_rng(0)
    exchanges = [sample_exchanges(scene, rng, 3) for scene in iter_scenes(0, "train", 3)]
    prefix = torch.randn(3, 5, SHAPE.hidden_size)
    loss, weight = torch.tensor(0.0), 0.0
    for row, of_image in enumerate(exchanges):
        for exchange in of_image:
            summed, count = answer_loss(llm, prefix[row], exchange)
            loss, weight = loss + exchange.weight * summed, weight + exchange.weight * count
    torch.testing.assert_close(OptReader(llm, TOKENIZER).loss(prefix, exchanges), loss / weight)


def test_the_loss_reaches_the_prefix(llm: OPTForCausalLM) -> None:
    prefix = torch.randn(1, 5, SHAPE.hidden_size, requires_grad=True)
    OptReader(llm, TOKENIZER).loss(prefix, [[QUESTION]]).backward()
    assert prefix.grad is not None
    assert (prefix.grad.abs().sum(dim=2) > 0).all()


def test_only_answer_and_end_are_targets() -> None:
    text = to_text(QUESTION, TOKENIZER)
    targets = [token for token, weight in zip(text.token_ids, text.weights, strict=True) if weight]
    assert TOKENIZER.convert_ids_to_tokens(targets) == ["red", "\n"]


def test_words_of_a_prompt_are_weak_targets_but_never_its_first() -> None:
    text = to_text(QUESTION, TOKENIZER, prompt_weight=0.05)
    words = TOKENIZER.convert_ids_to_tokens(text.token_ids)
    weights = dict(zip(words, text.weights, strict=True))
    assert words[:2] == ["</s>", "question"]
    assert (weights["</s>"], weights["question"], weights["circle"], weights["red"]) == (0.0, 0.0, 0.05, 1.0)


def test_a_caption_follows_the_begin_token_and_its_first_word_is_a_target() -> None:
    text = to_text(Exchange("", "a red circle", 0.5), TOKENIZER, prompt_weight=0.05)
    assert TOKENIZER.convert_ids_to_tokens(text.token_ids) == ["</s>", "a", "red", "circle", "\n"]
    assert text.weights == (0.0, 0.5, 0.5, 0.5, 0.5)


def test_cells_of_an_axis_begin_in_their_order(llm: OPTForCausalLM) -> None:
    embeddings = llm.get_input_embeddings().weight
    for axis in "xy":
        cells = embeddings[TOKENIZER.convert_tokens_to_ids([f"{axis}{cell}" for cell in range(GRID)])]
        along = cells @ (cells[GRID // 2 :].mean(0) - cells[: GRID // 2].mean(0))
        order = torch.stack([along, torch.arange(GRID).float()])
        assert torch.corrcoef(order)[0, 1] > 0.9


def test_descriptions_become_a_prefix_of_word_embeddings(llm: OPTForCausalLM) -> None:
    (scene,) = iter_scenes(0, "train", 1)
    prefix = embed_descriptions(llm, TOKENIZER, [scene], 28)
    assert prefix.shape == (1, 28, SHAPE.hidden_size)
    background = TOKENIZER.convert_tokens_to_ids(scene.background)
    torch.testing.assert_close(prefix[0, 0], llm.get_input_embeddings().weight[background])
