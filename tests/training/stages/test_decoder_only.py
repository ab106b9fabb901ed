"""The objective of OPT, compared with `transformers` on one text at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import OPTForCausalLM, PreTrainedTokenizerFast

from training.data.batches import QaTurn
from training.stages.decoder_only import DecoderOnlyObjective, tokenize_qa_turn
from training.tiny.config import LanguageShape
from training.tiny.language import build_language_model
from training.world.qa_turns import sample_qa_turns
from training.world.scenes import iter_scenes
from training.world.vocabulary import build_language_tokenizer

TOKENIZER = build_language_tokenizer()
END = TOKENIZER.eos_token_id
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
    text = tokenize_qa_turn(QUESTION, TOKENIZER, END)
    targets = [token for token, weight in zip(text.token_ids, text.weights, strict=True) if weight]
    assert TOKENIZER.convert_ids_to_tokens(targets) == ["red", "\n"]


def test_words_of_a_prompt_are_weak_targets_but_never_its_first() -> None:
    text = tokenize_qa_turn(QUESTION, TOKENIZER, END, prompt_weight=0.05)
    words = TOKENIZER.convert_ids_to_tokens(text.token_ids)
    weights = dict(zip(words, text.weights, strict=True))
    assert words[:2] == ["</s>", "question"]
    assert (weights["</s>"], weights["question"], weights["circle"], weights["red"]) == (0.0, 0.0, 0.05, 1.0)


def test_a_caption_follows_the_begin_token_and_its_first_word_is_a_target() -> None:
    text = tokenize_qa_turn(QaTurn("", "a red circle", 0.5), TOKENIZER, END, prompt_weight=0.05)
    assert TOKENIZER.convert_ids_to_tokens(text.token_ids) == ["</s>", "a", "red", "circle", "\n"]
    assert text.weights == (0.0, 0.5, 0.5, 0.5, 0.5)


def build_bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of bytes and of a few words, which differ with a space in front, as OPT's do."""
    letters = sorted(ByteLevel.alphabet())
    merges = [("e", "d"), ("r", "ed"), ("Ġ", "red"), ("Ġ", "a"), ("o", "f")]
    vocabulary = ["<pad>", "</s>", *letters, *("".join(pair) for pair in merges)]
    backend = Tokenizer(BPE({token: index for index, token in enumerate(vocabulary)}, merges))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


PROMPTS: tuple[tuple[str, str, list[str]], ...] = (
    ("Q: a? A:", "red", ["Ġred"]),  # as the model generates it: behind the prompt of the service
    ("a photo of", "a red", ["Ġa", "Ġred"]),
    ("a photo of ", "red a", ["red", "Ġa"]),  # the prompt ends in the space
    ("a\n", "red", ["red"]),
    ("", "red", ["red"]),  # a caption begins the text
    ("a", "", []),
)


@pytest.mark.parametrize(("prompt", "answer", "tokens"), PROMPTS)
def test_an_answer_keeps_the_space_in_front_of_it(prompt: str, answer: str, tokens: list[str]) -> None:
    tokenizer = build_bpe_tokenizer()
    text = tokenize_qa_turn(QaTurn(prompt, answer, 1.0), tokenizer, 1)
    prompt_ids = tokenizer(prompt).input_ids
    assert list(text.token_ids[: len(prompt_ids)]) == prompt_ids
    assert tokenizer.convert_ids_to_tokens(text.token_ids[len(prompt_ids) :]) == [*tokens, "</s>"]


@pytest.mark.public
@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("Question: what color is it? Answer:", "red", [1275, 50118]),  # " red"
        ("Question: how many cats are there? Answer:", "two cats", [80, 10017, 50118]),
        ("a photo of", "two cats", [80, 10017, 50118]),
        ("", "two cats", [7109, 10017, 50118]),  # "two"
    ],
)
def test_answers_in_opts_own_vocabulary(
    prompt: str, answer: str, expected: list[int], public_directory: Path
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(public_directory / "blip2-opt-2.7b")
    text = tokenize_qa_turn(QaTurn(prompt, answer, 1.0), tokenizer, 50118)
    assert text.token_ids == (*tokenizer(prompt).input_ids, *expected)
    assert tokenizer.decode(text.token_ids[1:-1]) == f"{prompt} {answer}".strip()
    assert [weight > 0 for weight in text.weights[-len(expected) :]] == [True] * len(expected)


def test_the_end_of_an_answer_is_the_language_models_own() -> None:
    """OPT's tokenizer names `</s>`, and BLIP-2's OPT ends an answer with the newline."""
    llm = build_language_model(SHAPE, TOKENIZER)
    prefix = torch.randn(1, 5, SHAPE.hidden_size)
    expected = DecoderOnlyObjective(llm, TOKENIZER).loss(prefix, [[QUESTION]])
    published = build_language_tokenizer()
    published.eos_token = "</s>"
    torch.testing.assert_close(DecoderOnlyObjective(llm, published).loss(prefix, [[QUESTION]]), expected)
