"""Write a checkpoint with random weights in the Hub's format, for the speed benchmarks.

    python -m benchmarks.random_checkpoint DIRECTORY [--language-model opt|t5]

ViT 768 x 12 at 224/14, Q-Former of BERT-base's size with 32 queries, OPT of 125M or T5 of base size; all in
bfloat16.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

NUM_QUERY_TOKENS = 32
VOCABULARY = 50304
IMAGE_TOKEN = 50265
IMAGE_SIZE = 224


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint with random weights.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--language-model", choices=["opt", "t5"], default="opt")
    arguments = parser.parse_args()
    make_checkpoint(arguments.directory, arguments.language_model)


def make_checkpoint(directory: Path, language_model: str) -> None:
    """Write the model with weights from N(0, 0.02), its tokenizer and its image processor."""
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            image_size=IMAGE_SIZE,
            patch_size=14,
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(encoder_hidden_size=768).to_dict(),
        text_config=(_opt_config() if language_model == "opt" else _t5_config()).to_dict(),
        num_query_tokens=NUM_QUERY_TOKENS,
        image_token_index=IMAGE_TOKEN,
    )
    model = Blip2ForConditionalGeneration(config).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02 + is_norm)
    model.tie_weights()
    model.save_pretrained(directory)
    _save_tokenizer(directory)
    BlipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(directory)


def _save_tokenizer(directory: Path) -> None:
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {
        f"w{index}": index for index in range(4, VOCABULARY)
    }
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def _opt_config() -> OPTConfig:
    return OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        word_embed_proj_dim=768,
        ffn_dim=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        eos_token_id=50118,
    )


def _t5_config() -> T5Config:
    return T5Config(
        vocab_size=VOCABULARY,
        d_model=768,
        d_kv=64,
        d_ff=2048,
        num_layers=12,
        num_heads=12,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )


if __name__ == "__main__":
    main()
