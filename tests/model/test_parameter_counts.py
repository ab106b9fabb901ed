"""The released sizes have the released numbers of parameters (built on "meta": nothing is allocated)."""

import copy

import pytest
import torch
from torch import nn

from model.checkpoints import QFormerBranch
from model.checkpoints.lavis import ENCODERS
from model.config import QFormerConfig
from model.matching import Matcher
from model.vision import build_vision_encoder
from tests.builders import build_text_tokenizer

WIDTHS = {"eva_clip_g": 1408, "clip_L": 1024}


def bert_base(encoder: str) -> QFormerConfig:
    return QFormerConfig(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        encoder_hidden_size=WIDTHS[encoder],
        num_query_tokens=32,
        vocab_size=30523,
        max_position_embeddings=512,
        joint_size=256,
    )


def count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize(
    ("encoder", "image_size", "expected"),
    [
        ("eva_clip_g", 224, 985_894_528),
        ("eva_clip_g", 364, 986_485_888),
        ("eva_clip_g", 490, 987_258_880),
        ("clip_L", 224, 290_581_504),
        ("clip_L", 364, 291_011_584),
        ("clip_L", 490, 291_573_760),
    ],
)
def test_image_encoders(encoder: str, image_size: int, expected: int) -> None:
    config = copy.deepcopy(ENCODERS[encoder])
    config.image_size = image_size
    with torch.device("meta"):
        vision_model = build_vision_encoder(config)
    # transformers gives EVA's attention a key bias, which is always zero and not counted by its authors.
    key_biases = 39 * 1408 if encoder == "eva_clip_g" else 0
    assert count(vision_model) - key_biases == expected


@pytest.mark.parametrize(("encoder", "expected"), [("eva_clip_g", 186_705_470), ("clip_L", 183_165_758)])
def test_stage_1(encoder: str, expected: int) -> None:
    with torch.device("meta"):
        matcher = Matcher(bert_base(encoder), build_text_tokenizer())
    matcher.tie_text_head()
    assert count(matcher) == expected


@pytest.mark.parametrize(
    ("encoder", "language_model_size", "expected"),
    [
        ("eva_clip_g", 2560, 107_133_696),  # OPT-2.7B
        ("eva_clip_g", 4096, 108_314_880),  # OPT-6.7B, FlanT5-XXL
        ("eva_clip_g", 2048, 106_739_968),  # FlanT5-XL
        ("clip_L", 2560, 103_593_984),
        ("clip_L", 4096, 104_775_168),
        ("clip_L", 2048, 103_200_256),
    ],
)
def test_stage_2(encoder: str, language_model_size: int, expected: int) -> None:
    with torch.device("meta"):
        branch = QFormerBranch(
            bert_base(encoder), language_model_size=language_model_size, layer_norm_eps=1e-6
        )
    assert count(branch) == expected
