"""Rows of one sequence share the keys and values of its prefix, and say what they say with their own."""

import random

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from model.generation.decoder import packed
from model.language import DecodingState, Extent, LanguageModel
from model.language.per_beam_state import PlainState
from model.language.shared_prefix_state import SharedPrefixState, why_not
from tests.builders import WORDS, build_language_tokenizer, build_opt, rows
from tests.builders_t5 import build_t5_language_model

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


def build_qwen2() -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=1, initializer_range=0.3)).eval()


BUILDERS = {
    "opt": lambda: LanguageModel(build_opt(), build_language_tokenizer()),
    "llama": lambda: LanguageModel(build_llama(), build_language_tokenizer()),
    "qwen2": lambda: LanguageModel(build_qwen2(), build_language_tokenizer()),
    "tied T5": lambda: build_t5_language_model("tied"),
    "untied T5": lambda: build_t5_language_model("untied"),
}


@pytest.fixture(params=BUILDERS)
def language_model(request: pytest.FixtureRequest) -> LanguageModel:
    return BUILDERS[request.param]().eval()


def prefix(length: int, *, seed: int) -> torch.Tensor:
    return torch.randn(length, 32, generator=torch.Generator().manual_seed(seed))


def admit(state: DecodingState, prefixes: list[torch.Tensor], widths: list[int]) -> torch.Tensor:
    extents = [Extent(len(each), width, 60) for each, width in zip(prefixes, widths, strict=True)]
    return state.admit(prefixes, extents)


def play(state: DecodingState) -> list[torch.Tensor]:
    """Sequences of several widths and lengths that join, reorder their rows, lose some and leave."""
    said = [admit(state, [prefix(9, seed=0), prefix(14, seed=1)], [3, 3])]
    said += [state.advance(rows((0, [0, 0, 0], [10, 11, 12]), (1, [0, 0, 0], [13, 14, 15])))]
    said += [state.advance(rows((0, [1, 0, 1], [19, 20, 21]), (1, [2, 2, 0], [16, 17, 18])))]
    said += [admit(state, [prefix(length, seed=length) for length in (5, 20, 11)], [1, 3, 4])]
    said += [
        state.advance(
            rows(
                (0, [0, 1, 2], [10, 10, 10]),
                (1, [1, 0], [12, 13]),
                (2, [0], [22]),
                (3, [0, 0, 0], [10, 11, 12]),
                (4, [0, 0, 0, 0], [10, 11, 12, 13]),
            )
        )
    ]
    state.retain([4, 1, 2, 3])
    state.retain([0, 1, 3])  # at once after another one
    for step in range(40):  # long enough for columns to be added, and to be written anew
        if step == 5:
            state.retain([0, 2])
        if step == 20:
            said += [admit(state, [prefix(7, seed=3), prefix(33, seed=4)], [16, 2])]
            state.retain([0, 1, 2])
        said += [
            state.advance(
                rows(
                    (0, [3, 0] if step == 0 else [1, 0], [10, 11]),
                    *([(1, [0, 1], [20, 21])] if step < 5 else []),
                    (2 if step < 5 else 1, [1, 2, 0], [10 + step % 7, 11, 12]),
                    *([(2, [0] * 4 if step == 20 else [2, 1, 3, 3], [14, 15, 16, 17])] if step >= 20 else []),
                )
            )
        ]
    state.retain([])
    said += [admit(state, [prefix(6, seed=5)], [2]), state.advance(rows((0, [0, 0], [10, 11])))]
    return said


@torch.inference_mode()
def test_what_rows_say_is_what_they_say_with_caches_of_their_own(language_model: LanguageModel) -> None:
    shared = language_model.build_state()
    assert isinstance(shared, SharedPrefixState)
    plain = PlainState(language_model.llm, language_model._family)
    for ours, theirs in zip(play(shared), play(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_a_prefix_is_read_and_held_once_whatever_the_number_of_its_rows() -> None:
    language_model = BUILDERS["opt"]()
    read: list[int] = []
    language_model.llm.model.decoder.layers[0].register_forward_pre_hook(
        lambda _, args: read.append(args[0].shape[:2].numel())
    )
    state = language_model.build_state()
    tokens = list(range(10, 26))
    admit(state, [prefix(30, seed=0), prefix(30, seed=1)], [16, 16])
    state.advance(rows(*((number, [0] * 16, tokens) for number in range(2))))
    assert read == [2 * 30, 2 * 16]
    assert (
        state._sight.table.any(axis=1).sum() == 2 * 30 + 2 * 16
    )  # columns in use: a prefix, and one for each row
    state.advance(rows(*((number, [3] * 16, tokens) for number in range(2))))
    assert state._sight.table.any(axis=1).sum() == 2 * 31 + 2 * 16  # all went on from one


def held_bytes(state: SharedPrefixState) -> int:
    layers = [layer for lines in (state._own, state._beside) for layer in lines.layers]
    return sum(tensor.numel() * tensor.itemsize for layer in layers for tensor in layer)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["opt", "untied T5"])
@pytest.mark.parametrize("seed", range(4))
def test_no_more_bytes_are_held_than_was_said_when_they_were_let_in(name: str, seed: int) -> None:
    """Wide and long sequences come and go, whose rows never share a token behind the prefix."""
    chance = random.Random(seed)
    state = BUILDERS[name]().build_state()
    assert isinstance(state, SharedPrefixState)
    running: list[tuple[Extent, int]] = []  # and how many tokens it has taken
    most = 0
    for _ in range(60):
        entering = [
            Extent(chance.choice([3, 12, 70]), chance.choice([1, 3, 16]), chance.choice([2, 4, 9]))
            for _ in range(chance.choice([0, 0, 1, 1, 5]))
        ]
        if entering:
            most = state.num_bytes([*(extent for extent, _ in running), *entering])
            state.admit([prefix(extent.num_prefix_tokens, seed=0) for extent in entering], entering)
            running += [(extent, 0) for extent in entering]
        if running:
            growths = [
                (number, range(extent.num_rows) if taken else [0] * extent.num_rows, [10] * extent.num_rows)
                for number, (extent, taken) in enumerate(running)
            ]
            state.advance(rows(*growths))
            assert held_bytes(state) <= most
            running = [(extent, taken + 1) for extent, taken in running]
            order = packed([taken < extent.max_new_tokens - 1 for extent, taken in running])
            state.retain(order)
            running = [running[number] for number in order]


def test_a_sequence_gone_leaves_nothing_behind_that_could_harm_its_successor() -> None:
    language_model = BUILDERS["opt"]()
    state = language_model.build_state()
    admit(state, [torch.full((20, 32), torch.nan), prefix(8, seed=1)], [1, 1])
    state.advance(rows((0, [0], [10]), (1, [0], [10])))
    state.retain([])
    admit(state, [prefix(4, seed=2)], [1])
    assert state.advance(rows((0, [0], [10]))).isfinite().all()


def test_models_that_look_through_a_window_go_the_plain_way_and_say_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    windowed = MistralForCausalLM(
        MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4, layer_types=["sliding_attention"] * 2)
    )
    language_model = LanguageModel(windowed, build_language_tokenizer())
    assert isinstance(language_model.build_state(), PlainState)
    assert (
        "MistralForCausalLM shares no keys and values between beams: it looks through a window" in caplog.text
    )
    assert why_not(build_opt()) is None


@torch.inference_mode()
def test_outside_of_decoding_the_model_attends_as_ever() -> None:
    language_model = BUILDERS["llama"]()
    language_model.llm.set_attn_implementation("eager")
    ids = torch.arange(10, 18)[None]
    before = language_model.llm(input_ids=ids).logits
    state = language_model.build_state()
    admit(state, [prefix(5, seed=0)], [2])
    state.advance(rows((0, [0, 0], [10, 11])))
    assert language_model.llm.config._attn_implementation == "eager"
    assert torch.equal(language_model.llm(input_ids=ids).logits, before)
