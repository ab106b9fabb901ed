"""T5: encoder and decoder, and independent rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Blip2ForConditionalGeneration,
)

from model import Blip2, Decoder, DecodeRequest, GenerationParams
from model.checkpoints import save_hub
from model.errors import InvalidParamsError, InvalidPromptError
from model.generation import run_requests
from model.language import LanguageModel
from model.language.encoder_decoder import EncoderDecoderBatch
from tests.builders import MAX_POSITIONS, NUM_QUERY_TOKENS, build_decode_input, decode_step, random_pixels
from tests.builders_t5 import (
    END,
    Tying,
    build_t5,
    build_t5_components,
    build_t5_language_model,
    build_t5_tokenizer,
)

PROMPTS = ("", "Question: what color is the small circle ? Short answer:", "a photo of")
KINDS = pytest.mark.parametrize("kind", ["tied", "untied"])


@pytest.fixture(scope="module")
def language_model() -> LanguageModel:
    return build_t5_language_model("untied")


def random_soft_tokens(num_tokens: int, *, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(seed))


def count_rows(module: nn.Module) -> list[int]:
    """Return a list to which each later pass of a module appends its batch size."""
    batch_sizes: list[int] = []

    def note(_module: nn.Module, _args: object, output: Any) -> None:
        batch_sizes.append(len(output if isinstance(output, Tensor) else output.last_hidden_state))

    module.register_forward_hook(note)
    return batch_sizes


def test_a_prompt_ends_with_the_end_of_text_token(language_model: LanguageModel) -> None:
    words = language_model.tokenizer.convert_tokens_to_ids(["a", "photo", "of"])
    assert language_model.tokenize("") == (END,)
    assert language_model.tokenize("a photo of") == (*words, END)


def test_a_tokenizer_that_adds_the_end_itself_changes_nothing(language_model: LanguageModel) -> None:
    adding = build_t5_language_model("untied")
    around = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    adding.tokenizer.backend_tokenizer.post_processor = around
    assert adding.tokenizer("a")["input_ids"][-1] == END
    assert adding.tokenize("a photo of") == language_model.tokenize("a photo of")


@pytest.fixture(scope="module")
def bart() -> LanguageModel:
    """Build an encoder-decoder whose positions are absolute."""
    config = BartConfig(
        vocab_size=60,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=MAX_POSITIONS,
    )
    return LanguageModel(BartForConditionalGeneration(config).eval(), build_t5_tokenizer())


def test_a_prompt_beyond_absolute_positions_is_refused(bart: LanguageModel) -> None:
    max_prompt_tokens = MAX_POSITIONS - NUM_QUERY_TOKENS
    checked = {"num_soft_tokens": NUM_QUERY_TOKENS, "max_new_tokens": MAX_POSITIONS}
    bart.check_length(num_prompt_tokens=max_prompt_tokens, **checked)
    with pytest.raises(
        InvalidPromptError,
        match=f"{max_prompt_tokens + 1} tokens.*makes {MAX_POSITIONS + 1}, the limit is {MAX_POSITIONS}; "
        "shorten",
    ):
        bart.check_length(num_prompt_tokens=max_prompt_tokens + 1, **checked)
    with pytest.raises(InvalidParamsError, match=f"answers with at most {MAX_POSITIONS} tokens; lower"):
        bart.check_length(num_prompt_tokens=1, num_soft_tokens=8, max_new_tokens=MAX_POSITIONS + 1)
    with pytest.raises(InvalidPromptError, match=f"the limit is {MAX_POSITIONS}; shorten it"):
        bart.tokenize("red " * (MAX_POSITIONS + 1))


@KINDS
@pytest.mark.parametrize("has_n_positions", [True, False])
@torch.inference_mode()
def test_a_t5_answers_prompts_longer_than_its_n_positions_as_in_transformers(
    kind: Tying, has_n_positions: bool
) -> None:
    t5 = build_t5(kind)
    if not has_n_positions:
        del t5.config.n_positions
    language_model = LanguageModel(t5, build_t5_tokenizer()).eval()
    prompt_ids = language_model.tokenize("what color is the big red star ? " * 20)
    assert len(prompt_ids) > MAX_POSITIONS
    soft_tokens = random_soft_tokens(NUM_QUERY_TOKENS)
    params = GenerationParams(num_beams=2, max_new_tokens=MAX_POSITIONS + 4, min_new_tokens=MAX_POSITIONS + 4)
    ((answer, *_),) = run_requests(language_model, [DecodeRequest(soft_tokens, prompt_ids, params)])
    embeds = language_model.embed_prefix(soft_tokens, prompt_ids)[None]
    tokens = t5.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        num_beams=params.num_beams,
        max_new_tokens=params.max_new_tokens,
        min_new_tokens=params.min_new_tokens,
    )
    assert tokens[0, 1:].tolist() == list(answer.token_ids)


def test_penalties_count_the_answer_alone_behind_its_start_token(language_model: LanguageModel) -> None:
    assert language_model.answer_context(NUM_QUERY_TOKENS, language_model.tokenize("a photo of")) == (0,)


def test_text_of_an_answer_has_no_special_tokens_and_no_end(language_model: LanguageModel) -> None:
    red, circle = language_model.tokenizer.convert_tokens_to_ids(["red", "circle"])
    assert language_model.decode_tokens((0, red, circle, END)) == "red circle"


@KINDS
@torch.inference_mode()
def test_logits_behind_image_and_prompts_equal_transformers(kind: Tying, tmp_path: Path) -> None:
    blip2 = Blip2(build_t5_components(kind)).eval()
    save_hub(tmp_path, blip2.components)
    reference = Blip2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    language_model = blip2.language_model
    assert language_model is not None
    pixel_values = random_pixels(len(PROMPTS))
    prompts = [language_model.tokenize(prompt) for prompt in PROMPTS]
    sequences = [[language_model.image_token_id] * NUM_QUERY_TOKENS + list(ids) for ids in prompts]
    size = max(map(len, sequences))
    expected = reference(
        pixel_values=pixel_values,
        input_ids=torch.tensor([row + [0] * (size - len(row)) for row in sequences]),
        attention_mask=torch.tensor([[1] * len(row) + [0] * (size - len(row)) for row in sequences]),
        decoder_input_ids=torch.tensor([[0, 10, 13], [0, 11, 14], [0, 12, 15]]),
    ).logits  # [B, 3, N]
    soft_tokens = blip2.project_queries(blip2.encode_queries(blip2.encode_images(pixel_values)))
    first, state = language_model.prefill(list(soft_tokens), prompts)
    later = [decode_step(state, tokens) for tokens in ([10, 11, 12], [13, 14, 15])]
    torch.testing.assert_close(torch.stack([first, *later], dim=1), expected, rtol=0, atol=1e-4)


@KINDS
@torch.inference_mode()
def test_unequal_prompts_in_one_prefill_continue_as_each_does_alone(kind: Tying) -> None:
    language_model = build_t5_language_model(kind)
    soft_tokens = [random_soft_tokens(8, seed=seed) for seed in range(3)]
    prompts = [language_model.tokenize(prompt) for prompt in PROMPTS]
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
    prompts = [language_model.tokenize(prompt) for prompt in PROMPTS[:2]]
    _, state = language_model.prefill(soft_tokens, prompts, beam_widths=[1, 2])
    state.decode_step(build_decode_input((0, [0], [10]), (1, [0], [11])))
    state.decode_step(build_decode_input((0, [0], [14]), (1, [0, 0], [12, 13])))
    logits = state.decode_step(build_decode_input((0, [0], [17]), (1, [1, 0], [15, 16])))
    for row, (source, tokens) in enumerate([(0, (10, 14, 17)), (1, (11, 13, 15)), (1, (11, 12, 16))]):
        _, alone = language_model.prefill([soft_tokens[source]], [prompts[source]])
        expected = [decode_step(alone, [token]) for token in tokens][-1]
        torch.testing.assert_close(logits[[row]], expected, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_image_and_prompt_are_encoded_once_for_each_request_whatever_its_beams() -> None:
    language_model = build_t5_language_model("untied")
    attention = language_model.llm.decoder.block[0].layer[1].EncDecAttention
    encoded, keyed = count_rows(language_model.llm.encoder), count_rows(attention.k)
    decoded = count_rows(language_model.llm.decoder)
    decoder = Decoder(language_model)
    for beams, prompt in zip((5, 3), PROMPTS, strict=False):
        params = GenerationParams(num_beams=beams, max_new_tokens=4, min_new_tokens=4)
        decoder.add(DecodeRequest(random_soft_tokens(8), language_model.tokenize(prompt), params))
    while decoder.num_requests:
        decoder.step()
    assert (encoded, keyed) == ([2], [2])
    assert decoded == [2, 8, 8, 8]


@torch.inference_mode()
def test_what_was_encoded_is_not_copied_when_beams_change_places(language_model: LanguageModel) -> None:
    soft_tokens = [random_soft_tokens(8, seed=seed) for seed in range(2)]
    prompts = [language_model.tokenize(prompt) for prompt in PROMPTS[:2]]
    prefixes = [language_model.embed_prefix(*each) for each in zip(soft_tokens, prompts, strict=True)]
    _, state = language_model.model_family.prefill_batch(prefixes)
    assert isinstance(state, EncoderDecoderBatch)
    state.reorder([0, 0, 1, 1])
    state.decode_step([10, 11, 12, 13])
    keys = state.cache.cross_attention_cache.layers[0].keys
    state.reorder([1, 0, 3, 3])
    assert state.cache.cross_attention_cache.layers[0].keys is keys
    state.reorder([1, 2])
    assert torch.equal(state.cache.cross_attention_cache.layers[0].keys, keys[[0, 2]])
    assert state.attention_mask is not None
    assert state.attention_mask.sum(dim=1).tolist() == [8 + len(prompt) for prompt in prompts]


@torch.inference_mode()
def test_bfloat16_gives_the_logits_of_float32_up_to_rounding() -> None:
    prompts, soft_tokens = [(10, 11, END)], [random_soft_tokens(8)]
    exact, _ = build_t5_language_model("untied").prefill(soft_tokens, prompts)
    rounded, _ = build_t5_language_model("untied").bfloat16().prefill(soft_tokens, prompts)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05 * exact.abs().max().item())
