"""Turns as token ids: prompts as the service tokenises them, answers as the language model writes them."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from model.errors import InvalidPromptError
from model.language import LanguageModel
from training.data.batches import QaTurn
from training.stages.turn_tokenizer import TurnTokenizer
from training.tiny.config import LanguageShape
from training.tiny.language import build_language_model
from training.world.vocabulary import build_language_tokenizer

TOKENIZER = build_language_tokenizer()
QUESTION = QaTurn("Question: what color is the circle ? Answer:", "red", 1.0)
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def tokenizer() -> TurnTokenizer:
    llm = build_language_model(LanguageShape(16, 1, 2, 16, max_position_embeddings=128), TOKENIZER)
    return TurnTokenizer(LanguageModel(llm, TOKENIZER))


def test_only_answer_and_end_are_targets(tokenizer: TurnTokenizer) -> None:
    text = tokenizer.continue_prompt(QUESTION, max_tokens=64)
    targets = [token for token, weight in zip(text.token_ids, text.weights, strict=True) if weight]
    assert TOKENIZER.convert_ids_to_tokens(targets) == ["red", "\n"]


def test_words_of_a_prompt_are_weak_targets_but_never_its_first(tokenizer: TurnTokenizer) -> None:
    text = tokenizer.continue_prompt(QUESTION, max_tokens=64, prompt_weight=0.05)
    words = TOKENIZER.convert_ids_to_tokens(text.token_ids)
    weights = dict(zip(words, text.weights, strict=True))
    assert words[:2] == ["</s>", "question"]
    assert (weights["</s>"], weights["question"], weights["circle"], weights["red"]) == (0.0, 0.0, 0.05, 1.0)


def test_without_a_prompt_the_begin_token_is_a_target_as_in_blip_2(tokenizer: TurnTokenizer) -> None:
    text = tokenizer.continue_prompt(QaTurn("", "a red circle", 0.5), max_tokens=64, prompt_weight=0.05)
    assert TOKENIZER.convert_ids_to_tokens(text.token_ids) == ["</s>", "a", "red", "circle", "\n"]
    assert text.weights == (0.5, 0.5, 0.5, 0.5, 0.5)


def test_a_text_that_is_cut_keeps_its_end(tokenizer: TurnTokenizer) -> None:
    turn = QaTurn("", "a red circle", 1.0)
    whole, cut, shortest = (tokenizer.continue_prompt(turn, max_tokens=size).token_ids for size in (5, 4, 3))
    assert TOKENIZER.convert_ids_to_tokens(whole) == ["</s>", "a", "red", "circle", "\n"]
    assert TOKENIZER.convert_ids_to_tokens(cut) == ["</s>", "a", "red", "\n"]
    assert TOKENIZER.convert_ids_to_tokens(shortest) == ["</s>", "a", "\n"]
    with pytest.raises(InvalidPromptError, match=r"1 tokens, and a text at most 2 .*raise max_text_tokens"):
        tokenizer.continue_prompt(turn, max_tokens=2)


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
    config = Qwen2Config(**SIZES, vocab_size=len(tokenizer), num_key_value_heads=2, eos_token_id=1)
    language_model = LanguageModel(Qwen2ForCausalLM(config), tokenizer)
    text = TurnTokenizer(language_model).continue_prompt(QaTurn(prompt, answer, 1.0), max_tokens=64)
    prompt_ids = language_model.tokenize(prompt)
    assert text.token_ids[: len(prompt_ids)] == prompt_ids
    assert tokenizer.convert_ids_to_tokens(text.token_ids[len(prompt_ids) :]) == [*tokens, "</s>"]


def test_without_begin_token_and_prompt_the_first_word_is_a_target() -> None:
    tokenizer = build_bpe_tokenizer()
    config = Qwen2Config(**SIZES, vocab_size=len(tokenizer), num_key_value_heads=2, eos_token_id=1)
    text = TurnTokenizer(LanguageModel(Qwen2ForCausalLM(config), tokenizer)).continue_prompt(
        QaTurn("", "red a", 1.0), max_tokens=64
    )
    assert tokenizer.convert_ids_to_tokens(text.token_ids) == ["red", "Ġa", "</s>"]
    assert text.weights == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("prompt", "answer", "tokens"),
    [("a", "red", ["▁red"]), ("a ", "red", ["red"]), ("", "red", ["▁red"])],
)
def test_a_tokenizer_that_puts_a_space_in_front_puts_no_second_one(
    prompt: str, answer: str, tokens: list[str]
) -> None:
    """Llama's: a text alone begins with a space; behind a prompt that ends in one, the answer must not."""
    pieces = ["<pad>", "</s>", *"▁:aredo", "re", "red", "▁red", "▁a"]
    merges = [("r", "e"), ("re", "d"), ("▁", "red"), ("▁", "a")]
    backend = Tokenizer(BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = Metaspace(split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    config = LlamaConfig(**SIZES, vocab_size=len(tokenizer), eos_token_id=1, bos_token_id=1)
    language_model = LanguageModel(LlamaForCausalLM(config), tokenizer)
    text = TurnTokenizer(language_model).continue_prompt(QaTurn(prompt, answer, 1.0), max_tokens=64)
    num_prompt_tokens = len(language_model.tokenize(prompt))
    assert tokenizer.convert_ids_to_tokens(text.token_ids[num_prompt_tokens:]) == [*tokens, "</s>"]


def test_the_end_of_an_answer_is_the_language_models_own(tokenizer: TurnTokenizer) -> None:
    """OPT's tokenizer names `</s>`, and BLIP-2's OPT ends an answer with the newline."""
    published = build_language_tokenizer()
    published.eos_token = "</s>"
    llm = build_language_model(LanguageShape(16, 1, 2, 16, max_position_embeddings=128), TOKENIZER)
    renamed = TurnTokenizer(LanguageModel(llm, published))
    expected = tokenizer.continue_prompt(QUESTION, max_tokens=64)
    assert renamed.continue_prompt(QUESTION, max_tokens=64) == expected


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
    sizes = {"hidden_size": 8, "word_embed_proj_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = OPTConfig(**sizes, ffn_dim=8, vocab_size=50304, max_position_embeddings=64, eos_token_id=50118)
    turn_tokenizer = TurnTokenizer(LanguageModel(OPTForCausalLM(config), tokenizer))
    text = turn_tokenizer.continue_prompt(QaTurn(prompt, answer, 1.0), max_tokens=32)
    assert text.token_ids == (*tokenizer(prompt).input_ids, *expected)
    assert tokenizer.decode(text.token_ids[1:-1]) == f"{prompt} {answer}".strip()
    assert [weight > 0 for weight in text.weights[-len(expected) :]] == [True] * len(expected)
