"""Rows of one sequence share the keys and values of its prefix, and say what they say with their own."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from model.language import DecodingState, Growth, LanguageModel
from model.language.plain import PlainState
from model.language.shared_prefix import SharedPrefixState, fits
from tests.builders import WORDS, build_language_tokenizer, build_opt

SIZES = {
    "vocab_size": len(WORDS) + 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "eos_token_id": 3,
}


def build_llama() -> PreTrainedModel:
    """With two keys for four queries."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.3)).eval()


@pytest.fixture(params=[build_opt, build_llama], ids=["opt", "llama"])
def language_model(request: pytest.FixtureRequest) -> LanguageModel:
    return LanguageModel(request.param(), build_language_tokenizer()).eval()


def prefix(length: int, *, seed: int) -> torch.Tensor:
    return torch.randn(length, 32, generator=torch.Generator().manual_seed(seed))


def play(state: DecodingState) -> list[torch.Tensor]:
    """Sequences of several widths and lengths that join, reorder their rows, lose some and leave."""
    said = [state.admit(["a", "b"], [prefix(9, seed=0), prefix(14, seed=1)], [3, 3])]
    said += state.advance([Growth("a", [0, 0, 0], [10, 11, 12]), Growth("b", [0, 0, 0], [13, 14, 15])])
    said += state.advance([Growth("b", [2, 2, 0], [16, 17, 18]), Growth("a", [1, 0, 1], [19, 20, 21])])
    said += [state.admit(["c", "d", "e"], [prefix(n, seed=n) for n in (5, 20, 11)], [1, 3, 4])]
    said += state.advance(
        [
            Growth("a", [0, 1, 2], [10, 10, 10]),
            Growth("c", [0], [22]),
            Growth("b", [1, 0], [12, 13]),
            Growth("d", [0, 0, 0], [10, 11, 12]),
            Growth("e", [0, 0, 0, 0], [10, 11, 12, 13]),
        ]
    )
    for step in range(40):  # long enough for columns to be added, and let go
        said += state.advance(
            [
                Growth("d", [1, 2, 0], [10 + step % 7, 11, 12]),
                Growth("e", [3, 0] if step in (0, 21) else [1, 0], [10, 11]),
                *([Growth("b", [0, 1], [20, 21])] if step < 5 else []),
            ][::-1]
        )
        if step == 20:
            said += [state.admit(["f"], [prefix(7, seed=3)], [3])]
            said += state.advance([Growth("f", [0, 0], [14, 15]), Growth("d", [0, 0, 2], [10, 11, 12])])
            said += [state.admit(["e"], [prefix(6, seed=4)], [4])]
            said += state.advance(
                [Growth("e", [0, 0, 0, 0], [14, 15, 16, 17]), Growth("d", [0, 1, 2], [9, 8, 7])]
            )
    return said


@torch.inference_mode()
def test_what_rows_say_is_what_they_say_with_caches_of_their_own(language_model: LanguageModel) -> None:
    shared = SharedPrefixState(language_model.llm)
    plain = PlainState(language_model._family._prefill)
    for ours, theirs in zip(play(shared), play(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_a_prefix_is_read_and_held_once_whatever_the_number_of_its_rows() -> None:
    llm = build_opt()
    read: list[int] = []
    llm.model.decoder.layers[0].register_forward_pre_hook(
        lambda _, args: read.append(args[0].shape[:2].numel())
    )
    state = SharedPrefixState(llm)
    state.admit(["a", "b"], [prefix(30, seed=0), prefix(30, seed=1)], [16, 16])
    tokens = list(range(10, 26))
    state.advance([Growth(key, [0] * 16, tokens) for key in ("a", "b")])
    assert read == [2 * 30, 2 * 16]
    assert held(state) == (2 * 30, 32 * 16)  # tokens: of prefixes, and 16 columns of 32 rows
    for _ in range(15):
        state.advance([Growth(key, list(range(16)), tokens) for key in ("a", "b")])
    assert held(state) == (2 * 30, 32 * 16)


def held(state: SharedPrefixState) -> tuple[int, int]:
    """How many tokens have keys in one layer, in prefixes and behind them."""
    lanes = list(state._lanes.values())
    of_prefixes = sum(lane.prefixes[0].keys[:, 0, :, 0].numel() for lane in lanes)
    return of_prefixes, sum(lane.suffixes[0].keys[:, 0, :, 0].numel() for lane in lanes)


def test_models_that_look_through_a_window_fall_back_to_the_plain_way() -> None:
    windowed = MistralForCausalLM(
        MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4, layer_types=["sliding_attention"] * 2)
    )
    assert not fits(windowed)
    assert fits(build_opt())


@torch.inference_mode()
def test_outside_of_decoding_the_model_attends_as_ever() -> None:
    llm = build_llama()
    llm.set_attn_implementation("eager")
    ids = torch.arange(10, 18)[None]
    before = llm(input_ids=ids).logits
    state = SharedPrefixState(llm)
    state.admit(["a"], [prefix(5, seed=0)], [2])
    assert llm.config._attn_implementation == "eager"
    assert torch.equal(llm(input_ids=ids).logits, before)
