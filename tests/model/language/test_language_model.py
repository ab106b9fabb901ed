"""The language model: tokens in, tokens out, and independent rows."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from model.errors import InvalidPromptError
from model.language import LanguageModel
from tests.builders import (
    END,
    MAX_POSITIONS,
    build_decode_input,
    build_language_model,
    build_opt,
    decode_step,
)


@pytest.fixture(scope="module")
def language_model() -> LanguageModel:
    return build_language_model()


def random_soft_tokens(num_tokens: int, *, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(seed))


def test_a_prompt_begins_with_the_beginning_of_text_token(language_model: LanguageModel) -> None:
    assert language_model.tokenize("") == (2,)
    assert language_model.tokenize("a photo of")[0] == 2
    assert len(language_model.tokenize("a photo of")) == 4


def test_a_tokenizer_that_adds_special_tokens_itself_changes_nothing(language_model: LanguageModel) -> None:
    adding = build_language_model()
    around = TemplateProcessing(single="</s> $A </s>", special_tokens=[("</s>", 2)])
    adding.tokenizer.backend_tokenizer.post_processor = around
    assert adding.tokenizer("a")["input_ids"][0] == 2
    assert adding.tokenize("a photo of") == language_model.tokenize("a photo of")


def test_a_prompt_beyond_the_positions_is_refused_with_count_limit_and_cure(
    language_model: LanguageModel,
) -> None:
    prompt = "red " * MAX_POSITIONS
    with pytest.raises(
        InvalidPromptError, match=f"{MAX_POSITIONS + 1} tokens, the limit is {MAX_POSITIONS}; shorten"
    ):
        language_model.tokenize(prompt)


def test_threads_that_tokenize_at_once_do_not_disturb_each_other(language_model: LanguageModel) -> None:
    prompts = ["red " * (number % 40) for number in range(400)]
    expected = [language_model.tokenize(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(language_model.tokenize, prompts)) == expected


def test_text_of_an_answer_has_no_special_tokens_and_no_end(language_model: LanguageModel) -> None:
    red, circle = language_model.tokenizer.convert_tokens_to_ids(["red", "circle"])
    assert language_model.decode_tokens((1, 2, red, circle, END)) == "red circle"


def test_image_tokens_are_counted_as_the_tokenizers_own_or_as_padding(language_model: LanguageModel) -> None:
    assert language_model.image_token_id == language_model.tokenizer.convert_tokens_to_ids("<image>")
    assert LanguageModel(build_opt(), language_model.tokenizer, image_token_id=7).image_token_id == 7


def test_several_end_tokens_are_all_known(language_model: LanguageModel) -> None:
    opt = build_opt()
    opt.generation_config.eos_token_id = [3, 2]
    assert LanguageModel(opt, language_model.tokenizer).eos_token_ids == (3, 2)
    assert language_model.eos_token_ids == (3,)


@torch.inference_mode()
def test_unequal_prompts_in_one_prefill_continue_as_each_does_alone(language_model: LanguageModel) -> None:
    soft_tokens = [random_soft_tokens(8, seed=seed) for seed in range(3)]
    prompts = [language_model.tokenize(text) for text in ("", "a photo of a big red circle", "what is it ?")]
    steps = [[10, 11, 12], [13, 14, 15]]
    together, state = language_model.prefill(soft_tokens, prompts)
    rows_together = [together, *(decode_step(state, tokens) for tokens in steps)]
    for row in range(3):
        alone, state = language_model.prefill([soft_tokens[row]], [prompts[row]])
        rows_alone = [alone, *(decode_step(state, [tokens[row]]) for tokens in steps)]
        for batched, single in zip(rows_together, rows_alone, strict=True):
            torch.testing.assert_close(batched[[row]], single, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_selected_rows_go_on_from_what_they_were_selected_from(language_model: LanguageModel) -> None:
    soft_tokens = [random_soft_tokens(8, seed=seed) for seed in range(2)]
    prompts = [language_model.tokenize(text) for text in ("a", "what is it ?")]
    _, state = language_model.prefill(soft_tokens, prompts, beam_widths=[1, 2])
    state.decode_step(build_decode_input((0, [0], [10]), (1, [0, 0], [11, 9])))
    first, *second = state.decode_step(build_decode_input((0, [0], [12]), (1, [1, 0], [12, 13])))
    _, expected = language_model.prefill(soft_tokens[1:], [(*prompts[1], 11)])
    torch.testing.assert_close(second[1][None], decode_step(expected, [13]), rtol=0, atol=1e-4)
    _, expected = language_model.prefill(soft_tokens[1:], [(*prompts[1], 9)])
    torch.testing.assert_close(second[0][None], decode_step(expected, [12]), rtol=0, atol=1e-4)
    _, expected = language_model.prefill(soft_tokens[:1], [(*prompts[0], 10)])
    torch.testing.assert_close(first[None], decode_step(expected, [12]), rtol=0, atol=1e-4)
