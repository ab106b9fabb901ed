"""Language models of no published BLIP-2: answers equal transformers', in its format or an adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Blip2ForConditionalGeneration,
    GPTNeoXConfig,
    GPTNeoXJapaneseConfig,
    LlamaConfig,
    MistralConfig,
    MT5Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RobertaConfig,
    RobertaForCausalLM,
)

from model import Blip2, CheckpointError, DecodeRequest
from model.checkpoints import LoadOptions, load_blip2, load_language_model
from model.checkpoints.convert import convert
from model.generation import run_requests
from tests.builders import WORDS, build_language_tokenizer
from tests.parity.test_transformers import (
    PROMPTS,
    SEARCHES,
    SIZES,
    build_config,
    random_pixels,
    randomize,
    reference_answer,
)

SIZE = SIZES[0]
BOS, EOS, IMAGE = 2, 3, 4
SIZES_OF_ALL: dict[str, Any] = {
    "vocab_size": len(WORDS) + 8,
    "max_position_embeddings": 128,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": 1,
}
SIZES_OF_DECODERS = SIZES_OF_ALL | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES_OF_DECODERS),
    "llama, tied": LlamaConfig(**SIZES_OF_DECODERS, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES_OF_DECODERS),
    "qwen2": Qwen2Config(**SIZES_OF_DECODERS | {"pad_token_id": None}),
    "gpt_neox": GPTNeoXConfig(**SIZES_OF_DECODERS),
    "gpt_neox_japanese": GPTNeoXJapaneseConfig(**SIZES_OF_DECODERS, is_decoder=True),
    "mt5": MT5Config(
        vocab_size=len(WORDS) + 8,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        decoder_start_token_id=1,
        eos_token_id=EOS,
        pad_token_id=1,
        tie_word_embeddings=False,
    ),
}
SPECIAL_TOKENS = {
    "llama": ((BOS,), ()),
    "mistral": ((BOS,), ()),
    "qwen2": ((), ()),
    "gpt_neox": ((), ()),
    "gpt_neox_japanese": ((), ()),
    "mt5": ((), (EOS,)),
}


def build_tokenizer(special_tokens: tuple[tuple[int, ...], tuple[int, ...]]) -> PreTrainedTokenizerFast:
    """Build a tokenizer that adds special tokens by itself, as those of these models do."""
    tokenizer = build_language_tokenizer()
    names = {BOS: "</s>", EOS: "\n"}
    first, last = ([names[token] for token in ids] for ids in special_tokens)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*first, "$A", *last], special_tokens=[(name, token) for token, name in names.items()]
    )
    return tokenizer


def save(directory: Path, name: str) -> Blip2ForConditionalGeneration:
    config = CONFIGS[name]
    whole = build_config(SIZE, config)
    whole.image_token_index = IMAGE
    model = Blip2ForConditionalGeneration(whole)
    randomize(model, seed=0)
    with torch.no_grad():  # ends now and then
        head = model.language_model.get_output_embeddings().weight
        head[EOS] *= 2
    model.save_pretrained(directory)
    build_tokenizer(SPECIAL_TOKENS[config.model_type]).save_pretrained(directory)
    return Blip2ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_answers_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    reference = save(tmp_path / "hub", name)
    convert(load_blip2(str(tmp_path / "hub")).components, tmp_path / "adapter", "adapter")
    for directory in (tmp_path / "hub", tmp_path / "adapter"):
        blip2 = Blip2.from_pretrained(str(directory))
        language_model = blip2.language_model
        assert language_model is not None
        first, last = SPECIAL_TOKENS[language_model.llm.config.model_type]
        prompt_ids = language_model.tokenize("a red")
        assert (prompt_ids[: len(first)], prompt_ids[len(first) + 2 :]) == (first, last)
        pixels = random_pixels(3, SIZE)
        inputs = blip2.project_queries(blip2.encode_queries(blip2.encode_images(pixels)))
        asked = [
            (image, language_model.tokenize(prompt), params)
            for params in SEARCHES
            for image in range(3)
            for prompt in PROMPTS
        ]
        requests = [DecodeRequest(inputs[image], prompt_ids, params) for image, prompt_ids, params in asked]
        answers = [list(best[0].token_ids) for best in run_requests(language_model, requests)]
        image_tokens = [IMAGE] * SIZE.num_query_tokens
        expected = [
            reference_answer(reference, pixels[image], [*image_tokens, *prompt_ids], params)
            for image, prompt_ids, params in asked
        ]
        assert answers == expected
        assert len({tuple(answer) for answer in answers}) >= 10
        assert any(answer[-1] == EOS for answer in answers)
        assert any(answer[-1] != EOS for answer in answers)


def test_a_tensor_too_few_is_named(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["language_model.model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the tensor '.*layers\.1\.mlp\.up_proj\.weight'"):
        Blip2.from_pretrained(str(tmp_path))


def test_mt5_is_refused_in_float16_too(tmp_path: Path) -> None:
    save(tmp_path, "mt5")
    with pytest.raises(CheckpointError, match="type 'mt5', which overflows in float16"):
        Blip2.from_pretrained(str(tmp_path), LoadOptions(dtype=torch.float16))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"eos_token_id": "x"}, "says that an answer ends with 'x'"),
        ({"eos_token_id": []}, r"says that an answer ends with \[\]"),
    ],
)
def test_end_tokens_that_are_none_are_refused(
    fields: dict[str, object], complaint: str, tmp_path: Path
) -> None:
    save(tmp_path / "hub", "llama")
    convert(load_blip2(str(tmp_path / "hub")).components, tmp_path / "adapter", "adapter")
    (tmp_path / "adapter" / "language_model" / "generation_config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=complaint):
        Blip2.from_pretrained(str(tmp_path / "adapter"))


def test_an_encoder_is_no_language_model(tmp_path: Path) -> None:
    sizes = {"vocab_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertLMHeadModel(BertConfig(hidden_size=8, **sizes)).save_pretrained(tmp_path)
    build_language_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"of type 'bert' with 'is_decoder' false.*set it to true"):
        load_language_model(tmp_path)


def test_a_decoder_whose_positions_begin_elsewhere_is_refused(tmp_path: Path) -> None:
    RobertaForCausalLM(RobertaConfig(**SIZES_OF_DECODERS, is_decoder=True)).save_pretrained(tmp_path)
    build_language_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"of type 'roberta', whose positions do not begin at 0"):
        load_language_model(tmp_path)
