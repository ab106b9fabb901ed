"""Small random checkpoints with an encoder-decoder language model (T5)."""

import dataclasses
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from model.checkpoints import save_generation_adapter
from model.components import Blip2Components
from model.language import LanguageModel
from model.prompts import PromptTemplates
from tests.builders import (
    MAX_POSITIONS,
    WORDS,
    build_components,
    build_word_tokenizer,
    save_random_checkpoint,
)

Tying = Literal["tied", "untied"]
END = 1  # the id of </s>
PROMPT_WORDS = ("Question:", "Short", "answer:", "Answer:")


def build_t5_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of words; as with T5, padding is 0 and </s>, 1, ends a prompt and an answer."""
    vocabulary = ["<pad>", "</s>", "<unk>", "<image>", *PROMPT_WORDS, *WORDS]
    return build_word_tokenizer(vocabulary, eos_token="</s>", additional_special_tokens=["<image>"])


def build_t5(kind: Tying, *, seed: int = 3) -> T5ForConditionalGeneration:
    """Build a random T5 whose next token is neither certain nor uniform, and sometimes ends the answer.

    kind: "tied" is the first T5: ReLU, and its head is the word embeddings. "untied" is Flan-T5 as in BLIP-2:
    gated, with the exact GELU and a head of its own.
    """
    torch.manual_seed(seed)
    shape = {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"} if kind == "untied" else {}
    config = T5Config(
        vocab_size=len(PROMPT_WORDS) + len(WORDS) + 8,  # more rows than words, as in the released models
        d_model=32,
        d_kv=12,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=32,
        n_positions=MAX_POSITIONS,
        decoder_start_token_id=0,
        tie_word_embeddings=kind == "tied",
        **shape,
    )
    t5 = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        t5.shared.weight.mul_(0.5)
        t5.decoder.final_layer_norm.weight.normal_()  # else each token mostly predicts itself
        for stack in (t5.encoder, t5.decoder):
            stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(4)
        if kind == "untied":
            t5.lm_head.weight = nn.Parameter(torch.randn_like(t5.shared.weight) / 4)
        t5.lm_head.weight[END] *= 4  # else an answer hardly ever ends
    return t5


def build_t5_language_model(kind: Tying, *, seed: int = 3) -> LanguageModel:
    return LanguageModel(build_t5(kind, seed=seed), build_t5_tokenizer()).eval()


def build_t5_components(kind: Tying, *, seed: int = 3) -> Blip2Components:
    """Build the model of `build_components` with a T5."""
    language_model = build_t5_language_model(kind, seed=seed)
    return dataclasses.replace(
        build_components(),
        language_model=language_model,
        prompts=PromptTemplates(question=language_model.question_template),
    )


def save_random_t5_checkpoint(root: Path, kind: Tying) -> Path:
    """Add {language_model_t5, stage2_t5} to a random checkpoint under `root`; return the latter."""
    save_random_checkpoint(root)
    components = build_t5_components(kind)
    assert components.language_model is not None
    components.language_model.llm.save_pretrained(root / "language_model_t5")
    components.language_model.tokenizer.save_pretrained(root / "language_model_t5")
    save_generation_adapter(
        root / "stage2_t5",
        components,
        vision_directory=root / "vision_model",
        language_directory=root / "language_model_t5",
        retrieval_directory=root / "stage1",
    )
    return root / "stage2_t5"
