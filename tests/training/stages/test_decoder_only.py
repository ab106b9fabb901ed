"""The objective of decoder-only models, compared with `transformers` on one text at a time."""

from math import log
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from model.language import LanguageModel
from tests.builders import WORDS, build_language_tokenizer
from training.data.batches import QaTurn
from training.data.packing import WeightedText, pack_texts
from training.stages.decoder_only import DecoderOnlyObjective
from training.stages.packed_decoding import can_pack, lm_loss
from training.stages.stage2 import LanguageObjective, build_objective
from training.stages.turn_tokenizer import TurnTokenizer

SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS) + 5,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}
GROUPED: dict[str, Any] = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "opt": OPTConfig(**SIZES, word_embed_proj_dim=32, ffn_dim=64, init_std=0.2),
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "mistral": MistralConfig(**GROUPED),
    "gpt2": GPT2Config(**SIZES),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=64),
    "bloom": BloomConfig(**SIZES),
}
UNPACKED = {"bloom"}  # its positions are in its mask
TURNS = [
    [QaTurn("", "a red circle above a blue star", 0.5), QaTurn("what color is the circle ?", "red", 1.0)],
    [QaTurn("how many ?", "two", 1.0), QaTurn("", "a star", 0.5), QaTurn("", "a blue star", 0.5)],
]


def build_model(name: str, attention: str = "eager") -> LanguageModel:
    torch.manual_seed(0)
    config = CONFIGS[name]
    llm = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config, attn_implementation=attention)
    return LanguageModel(llm.eval().requires_grad_(False), build_language_tokenizer())


def loss_one_by_one(language_model: LanguageModel, prefix: Tensor) -> Tensor:
    """Compute the weighted mean loss from the logits of each text by itself."""
    tokenizer = TurnTokenizer(language_model)
    total, weight = torch.tensor(0.0), 0.0
    for soft_tokens, turns in zip(prefix, TURNS, strict=True):
        for turn in turns:
            text = tokenizer.continue_prompt(turn, max_tokens=32)
            embeds = language_model.embed_prefix(soft_tokens, text.token_ids)
            logits = language_model.llm(inputs_embeds=embeds[None]).logits[0, len(soft_tokens) - 1 : -1]
            losses = F.cross_entropy(logits, torch.tensor(text.token_ids), reduction="none")
            total = total + (losses * torch.tensor(text.weights)).sum()
            weight += sum(text.weights)
    return total / weight


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", sorted(set(CONFIGS) - UNPACKED))
def test_packed_turns_have_the_loss_and_the_gradient_of_each_alone(name: str, attention: str) -> None:
    language_model = build_model(name, attention)
    assert can_pack(language_model.llm)
    assert_equals_one_by_one(build_objective(language_model), language_model)


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_of_one_text_have_the_loss_and_the_gradient_of_each_alone(name: str) -> None:
    language_model = build_model(name)
    objective = DecoderOnlyObjective(language_model, TurnTokenizer(language_model), 32, packs=False)
    assert_equals_one_by_one(objective, language_model)


def assert_equals_one_by_one(objective: LanguageObjective, language_model: LanguageModel) -> None:
    prefix = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss, expected = objective.loss(prefix, TURNS), loss_one_by_one(language_model, prefix)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    gradients = [torch.autograd.grad(each, prefix)[0] for each in (loss, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-5)
    assert (gradients[0].abs().sum(dim=2) > 0).all()


class Deaf(torch.nn.Module):
    """A model that takes a mask and positions, and computes without them."""

    def __init__(self, llm: PreTrainedModel) -> None:
        super().__init__()
        self.llm = llm

    def get_input_embeddings(self) -> Any:
        return self.llm.get_input_embeddings()

    def forward(
        self, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **rest: Any
    ) -> Any:
        return self.llm(**rest)


def test_models_that_refuse_or_ignore_the_mask_of_packed_texts_are_found() -> None:
    assert not can_pack(build_model("bloom").llm)
    assert not can_pack(Deaf(build_model("llama").llm))


def test_without_begin_token_and_prompt_the_first_word_is_predicted_from_the_last_soft_token() -> None:
    language_model = build_model("qwen2")
    prefix = torch.randn(1, 5, 32)
    loss = build_objective(language_model).loss(prefix, [[QaTurn("", "red", 1.0)]])
    (red,) = language_model.tokenize("red")
    logits = language_model.llm(inputs_embeds=language_model.embed_prefix(prefix[0], [red])[None]).logits[0]
    expected = F.cross_entropy(logits[[4, 5]], torch.tensor([red, 3]))
    torch.testing.assert_close(loss, expected)


def test_the_loss_is_the_weighted_mean_over_targets_wherever_they_are() -> None:
    """Targets of probability 1/2, 1/4 and 1/8 with weights 1, 1 and .5: 4.5 log 2 over 2.5."""
    texts = [WeightedText((0, 1), (1.0, 1.0)), WeightedText((1, 0), (0.0, 0.5))]
    batch = pack_texts([texts], prefix_length=2, pad_token_id=0)
    assert batch.kept_columns.tolist() == [1, 2, 4]  # of 2 + 4
    chances = torch.tensor([[[1 / 2, 1 / 2], [3 / 4, 1 / 4], [1 / 8, 7 / 8]]])
    assert lm_loss(chances.log(), batch).item() == pytest.approx(4.5 * log(2) / 2.5)


def test_half_precision_models_have_a_finite_loss_behind_a_float32_prefix() -> None:
    language_model = build_model("llama").to(torch.bfloat16)
    prefix = torch.randn(2, 5, 32, requires_grad=True)
    loss = build_objective(language_model).loss(prefix, TURNS)
    torch.autograd.backward(loss)
    assert loss.dtype == torch.float32
    assert prefix.grad is not None
    assert prefix.grad.isfinite().all()


def test_texts_fill_the_positions_behind_the_soft_tokens_and_no_more() -> None:
    """64 positions, 50 soft tokens: 14 for a text. A longer caption is cut, and its end stays."""
    language_model = build_model("opt")
    objective = build_objective(language_model)
    prefix = torch.randn(1, 50, 32)
    longest, longer = (objective.loss(prefix, [[QaTurn("", " ".join(["red"] * n), 1.0)]]) for n in (12, 13))
    torch.testing.assert_close(longer, longest, rtol=0, atol=0)
