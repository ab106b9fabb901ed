"""Packed weights: the products of unpacked ones, and the same weights when they are saved."""

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from model import Blip2, GenerationParams
from model.checkpoints import LoadOptions, save_hub
from model.components import Blip2Components
from model.packing import PackedLinear, can_pack, pack_linears
from model.vision import FAMILIES, VisionEncoder, cpu_attention
from tests.builders import build_components, build_vit, random_pixels
from tests.builders_t5 import build_t5_components

pytestmark = pytest.mark.skipif(
    not can_pack(torch.bfloat16), reason="this CPU, or this build of torch, computes no bfloat16 by oneDNN"
)
PARAMS = GenerationParams(num_beams=4, num_return_sequences=4, max_new_tokens=12)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_packed_layer_gives_what_the_unpacked_one_gives(dtype: torch.dtype, has_bias: bool) -> None:
    linear = nn.Linear(46, 33, bias=has_bias).to(dtype)
    packed_layer = PackedLinear(linear)
    atol = 1e-6 if dtype == torch.float32 else 2e-2
    for shape in ((1, 46), (5, 46), (2, 7, 46), (1000, 46), (3, 0, 46)):
        inputs = torch.randn(shape, dtype=dtype)
        torch.testing.assert_close(packed_layer(inputs), linear(inputs), rtol=0, atol=atol)
    inputs = torch.randn(8, 92, dtype=dtype)[::2, ::2]  # not side by side in memory
    torch.testing.assert_close(packed_layer(inputs), linear(inputs), rtol=0, atol=atol)


@torch.inference_mode()
def test_a_product_may_be_of_another_type_than_what_goes_in_and_comes_out() -> None:
    linear, inputs = nn.Linear(64, 32), torch.randn(5, 64)
    output = PackedLinear(linear, torch.bfloat16)(inputs)
    assert output.dtype == torch.float32
    assert not torch.equal(output, linear(inputs))
    torch.testing.assert_close(output, linear(inputs), rtol=0, atol=5e-2)


def test_a_packed_layer_is_saved_as_it_was() -> None:
    layers = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False))
    before = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    assert pack_linears(layers) == 2
    after = layers.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_other_layers_than_linear_ones_stay_as_they_are() -> None:
    class Special(nn.Linear):
        pass

    layers = nn.ModuleList([Special(4, 4), nn.Linear(4, 4).double(), nn.Linear(4, 4, device="meta")])
    assert pack_linears(layers) == 0
    assert pack_linears(nn.Sequential(nn.Linear(4, 4))) == 1


def test_a_weight_is_freed_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    weights = [weakref.ref(layer.weight) for layer in layers]
    alive: list[int] = []

    reorder = torch.ops.mkldnn._reorder_linear_weight

    def count_and_reorder(weight: torch.Tensor, batch_size: int | None) -> torch.Tensor:
        alive.append(sum(weight() is not None for weight in weights))
        reordered: torch.Tensor = reorder(weight, batch_size)
        return reordered

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", count_and_reorder)
    pack_linears(layers)
    num_others = torch.get_num_threads() - 1  # threads, each with a weight
    assert len(alive) == 5
    assert all(count <= 5 - index + num_others for index, count in enumerate(alive))


def test_a_packed_model_keeps_no_map_of_its_weight_file(tmp_path: Path) -> None:
    save_hub(tmp_path, build_components())
    blip2 = Blip2.from_pretrained(str(tmp_path), LoadOptions(dtype=torch.bfloat16))
    weights = {name: tensor.clone() for name, tensor in blip2.state_dict().items()}
    blip2.pack()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in blip2.state_dict().items())


def test_where_the_cpu_has_no_products_of_a_type_its_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    layers = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4))
    assert pack_linears(layers, torch.bfloat16) == 0
    assert pack_linears(layers) == 1


@pytest.mark.parametrize("build", [build_components, lambda: build_t5_components("tied")], ids=["opt", "t5"])
@torch.inference_mode()
def test_a_packed_model_gives_the_answers_of_the_unpacked_one(build: Callable[[], Blip2Components]) -> None:
    unpacked, packed_model = Blip2(build()).eval(), Blip2(build()).eval()
    packed_model.load_state_dict(unpacked.state_dict())
    assert packed_model.pack() > 20
    assert packed_model.pack() == 0
    assert not any(type(module) is nn.Linear for module in packed_model.modules())
    answers = []
    for blip2 in (unpacked, packed_model):
        inputs = blip2.project_queries(blip2.encode_queries(blip2.encode_images(random_pixels(4))))
        answers.append(blip2.generate(inputs, ["a photo of"] * 4, PARAMS))
    for ours, theirs in zip(*answers, strict=True):
        assert [answer.token_ids for answer in ours] == [answer.token_ids for answer in theirs]
        assert [answer.score for answer in ours] == pytest.approx(
            [answer.score for answer in theirs], abs=1e-4
        )


@pytest.mark.parametrize("kind", FAMILIES)
@torch.inference_mode()
def test_image_features_in_bfloat16_are_those_of_the_unpacked_encoder_up_to_rounding(kind: str) -> None:
    unpacked, packed_model = (
        Blip2(dataclasses.replace(build_components(), vision_model=VisionEncoder(build_vit(kind).bfloat16())))
        for _ in range(2)
    )
    packed_model.load_state_dict(unpacked.state_dict())
    packed_model.pack()
    pixel_values = torch.randn(5, 3, 32, 32)
    expected = unpacked.encode_images(pixel_values).float()
    features = packed_model.encode_images(pixel_values).float()
    assert packed_model.vision_model.vit.config._attn_implementation == cpu_attention.NAME
    torch.testing.assert_close(features, expected, rtol=0, atol=0.05 * expected.abs().max().item())


@torch.inference_mode()
def test_attention_is_equal_however_many_images_are_computed_together() -> None:
    query, key, value = torch.randn(3, 7, 4, 50, 16)
    expected = scaled_dot_product_attention(query, key, value).transpose(1, 2)
    for max_scores in (1, 4 * 50 * 50 * 3, 2**21):
        output, _ = cpu_attention.attend(nn.Identity(), query, key, value, None, max_scores=max_scores)
        torch.testing.assert_close(output, expected)
