"""Beams share the keys and values of their prefix, and have the logits of separate caches."""

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

from model.generation.decoder import compact_order
from model.language import DecodingState, LanguageModel, MemoryRequirement
from model.language.per_beam_state import PerBeamState
from model.language.shared_prefix_state import SharedPrefixState, unsupported_reason
from tests.builders import WORDS, build_decode_input, build_language_tokenizer, build_opt
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
    """Build a Llama with two key heads for four query heads."""
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


def prefill(state: DecodingState, prefixes: list[torch.Tensor], beam_widths: list[int]) -> torch.Tensor:
    requirements = [
        MemoryRequirement(len(each), width, 60) for each, width in zip(prefixes, beam_widths, strict=True)
    ]
    return state.prefill(prefixes, requirements)


def run_scenario(state: DecodingState) -> list[torch.Tensor]:
    """Return the logits of unequal sequences that join, reorder and drop beams, and leave."""
    logits = [prefill(state, [prefix(9, seed=0), prefix(14, seed=1)], [3, 3])]
    logits += [
        state.decode_step(build_decode_input((0, [0, 0, 0], [10, 11, 12]), (1, [0, 0, 0], [13, 14, 15])))
    ]
    logits += [
        state.decode_step(build_decode_input((0, [1, 0, 1], [19, 20, 21]), (1, [2, 2, 0], [16, 17, 18])))
    ]
    logits += [prefill(state, [prefix(length, seed=length) for length in (5, 20, 11)], [1, 3, 4])]
    logits += [
        state.decode_step(
            build_decode_input(
                (0, [0, 1, 2], [10, 10, 10]),
                (1, [1, 0], [12, 13]),
                (2, [0], [22]),
                (3, [0, 0, 0], [10, 11, 12]),
                (4, [0, 0, 0, 0], [10, 11, 12, 13]),
            )
        )
    ]
    state.permute([4, 1, 2, 3])
    state.permute([0, 1, 3])  # at once after another one
    for step in range(40):  # long enough for slots to be added, and to be written again
        if step == 5:
            state.permute([0, 2])
        if step == 20:
            logits += [prefill(state, [prefix(7, seed=3), prefix(33, seed=4)], [16, 2])]
            state.permute([0, 1, 2])
        logits += [
            state.decode_step(
                build_decode_input(
                    (0, [3, 0] if step == 0 else [1, 0], [10, 11]),
                    *([(1, [0, 1], [20, 21])] if step < 5 else []),
                    (2 if step < 5 else 1, [1, 2, 0], [10 + step % 7, 11, 12]),
                    *([(2, [0] * 4 if step == 20 else [2, 1, 3, 3], [14, 15, 16, 17])] if step >= 20 else []),
                )
            )
        ]
    state.permute([])
    logits += [
        prefill(state, [prefix(6, seed=5)], [2]),
        state.decode_step(build_decode_input((0, [0, 0], [10, 11]))),
    ]
    return logits


@torch.inference_mode()
def test_beams_have_the_logits_that_they_have_with_caches_of_their_own(language_model: LanguageModel) -> None:
    shared = language_model.build_state()
    assert isinstance(shared, SharedPrefixState)
    per_beam = PerBeamState(language_model.model_family)
    for ours, theirs in zip(run_scenario(shared), run_scenario(per_beam), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_a_prefix_is_computed_and_held_once_whatever_the_number_of_its_beams() -> None:
    language_model = BUILDERS["opt"]()
    num_tokens: list[int] = []
    language_model.llm.model.decoder.layers[0].register_forward_pre_hook(
        lambda _, args: num_tokens.append(args[0].shape[:2].numel())
    )
    state = language_model.build_state()
    assert isinstance(state, SharedPrefixState)
    tokens = list(range(10, 26))
    prefill(state, [prefix(30, seed=0), prefix(30, seed=1)], [16, 16])
    state.decode_step(build_decode_input(*((number, [0] * 16, tokens) for number in range(2))))
    assert num_tokens == [2 * 30, 2 * 16]
    assert state.num_used_slots == 2 * 30 + 2 * 16  # a prefix, and one for each beam
    state.decode_step(build_decode_input(*((number, [3] * 16, tokens) for number in range(2))))
    assert state.num_used_slots == 2 * 31 + 2 * 16  # all continue one beam


@torch.inference_mode()
@pytest.mark.parametrize("name", ["opt", "untied T5"])
@pytest.mark.parametrize("seed", range(4))
def test_no_more_bytes_are_allocated_than_the_requirements_of_the_sequences_say(name: str, seed: int) -> None:
    """Run wide and long sequences whose beams never share a token behind the prefix."""
    chance = random.Random(seed)
    language_model = BUILDERS[name]()
    state = language_model.build_state()
    assert isinstance(state, SharedPrefixState)
    running: list[tuple[MemoryRequirement, int]] = []  # and the number of its tokens
    most = 0
    for _ in range(60):
        admitted = [
            MemoryRequirement(chance.choice([3, 12, 70]), chance.choice([1, 3, 16]), chance.choice([2, 4, 9]))
            for _ in range(chance.choice([0, 0, 1, 1, 5]))
        ]
        if admitted:
            most = language_model.kv_bytes([*(requirement for requirement, _ in running), *admitted])
            state.prefill([prefix(each.num_prefix_tokens, seed=0) for each in admitted], admitted)
            running += [(requirement, 0) for requirement in admitted]
        if running:
            beams = [
                (sequence, range(each.num_rows) if taken else [0] * each.num_rows, [10] * each.num_rows)
                for sequence, (each, taken) in enumerate(running)
            ]
            state.decode_step(build_decode_input(*beams))
            assert state.num_bytes <= most
            running = [(requirement, taken + 1) for requirement, taken in running]
            order = compact_order([taken < each.max_new_tokens - 1 for each, taken in running])
            state.permute(order)
            running = [running[number] for number in order]


def test_a_dropped_sequence_leaves_nothing_that_could_harm_its_successor() -> None:
    language_model = BUILDERS["opt"]()
    state = language_model.build_state()
    prefill(state, [torch.full((20, 32), torch.nan), prefix(8, seed=1)], [1, 1])
    state.decode_step(build_decode_input((0, [0], [10]), (1, [0], [10])))
    state.permute([])
    prefill(state, [prefix(4, seed=2)], [1])
    assert state.decode_step(build_decode_input((0, [0], [10]))).isfinite().all()


def test_models_with_sliding_window_attention_fall_back_to_a_cache_per_beam_and_log_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    windowed = MistralForCausalLM(
        MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4, layer_types=["sliding_attention"] * 2)
    )
    language_model = LanguageModel(windowed, build_language_tokenizer())
    assert isinstance(language_model.build_state(), PerBeamState)
    assert (
        "MistralForCausalLM shares no keys and values between beams: it uses sliding-window attention"
        in caplog.text
    )
    assert unsupported_reason(build_opt()) is None


@torch.inference_mode()
def test_outside_of_decoding_the_model_attends_as_ever() -> None:
    language_model = BUILDERS["llama"]()
    language_model.llm.set_attn_implementation("eager")
    ids = torch.arange(10, 18)[None]
    before = language_model.llm(input_ids=ids).logits
    state = language_model.build_state()
    prefill(state, [prefix(5, seed=0)], [2])
    state.decode_step(build_decode_input((0, [0, 0], [10, 11])))
    assert language_model.llm.config._attn_implementation == "eager"
    assert torch.equal(language_model.llm(input_ids=ids).logits, before)
