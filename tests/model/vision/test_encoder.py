"""The frozen image encoder."""

import pytest
import torch
from transformers import Blip2VisionModel, CLIPVisionConfig, CLIPVisionModel

from model.vision import VisionEncoder, build_vision_encoder
from tests.builders import IMAGE_SIZE, build_vision_config, build_vit, random_pixels

MODEL_TYPES = ["blip_2_vision_model", "clip_vision_model", "siglip_vision_model", "vit", "dinov2"]


@torch.inference_mode()
def test_features_are_those_before_the_final_norm() -> None:
    torch.manual_seed(0)
    vit = Blip2VisionModel(build_vision_config()).eval()
    torch.nn.init.normal_(vit.post_layernorm.weight)
    final_norm = vit.post_layernorm
    normed = vit(pixel_values=random_pixels(2)).last_hidden_state
    image_features = VisionEncoder(vit)(random_pixels(2))
    assert not torch.allclose(image_features, normed, atol=0.1)
    torch.testing.assert_close(final_norm(image_features), normed)


@torch.inference_mode()
def test_both_kinds_of_attention_give_the_same_features() -> None:
    torch.manual_seed(0)
    eager = build_vision_encoder(build_vision_config(), attn_implementation="eager").eval()
    sdpa = build_vision_encoder(build_vision_config()).eval()
    sdpa.load_state_dict(eager.state_dict())
    assert eager.vit.config._attn_implementation == "eager"
    assert sdpa.vit.config._attn_implementation == "sdpa"
    torch.testing.assert_close(eager(random_pixels(2)), sdpa(random_pixels(2)), rtol=0, atol=1e-4)


def test_sizes_are_those_of_the_tower() -> None:
    encoder = build_vision_encoder(build_vision_config())
    assert (encoder.image_size, encoder.hidden_size) == (IMAGE_SIZE, 48)
    assert encoder.num_image_tokens == encoder(random_pixels(1)).shape[1] == 17


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_pixels_are_cast_to_the_type_of_the_weights(dtype: torch.dtype) -> None:
    encoder = build_vision_encoder(build_vision_config()).to(dtype)
    assert encoder(random_pixels(1)).dtype == encoder.dtype == dtype


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.inference_mode()
def test_features_are_the_hidden_states_of_their_layer(model_type: str, layer: int) -> None:
    vit = build_vit(model_type)
    outputs: list[torch.Tensor] = []  # hidden_states[-1] is behind the final norm in some families
    layers = next(each for each in vit.modules() if isinstance(each, torch.nn.ModuleList))
    for each in layers:
        each.register_forward_hook(lambda _, __, output: outputs.append(output))
    vit(pixel_values=random_pixels(2))
    expected = outputs[layer][0] if isinstance(outputs[layer], tuple) else outputs[layer]
    torch.testing.assert_close(VisionEncoder(vit, feature_layer=layer)(random_pixels(2)), expected)


@torch.inference_mode()
def test_a_clip_vit_l_without_its_last_layer_is_the_second_last_layer_of_transformers() -> None:
    torch.manual_seed(0)
    config = CLIPVisionConfig(  # ViT-L/14 but for its width, heads and the number of its layers
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        initializer_factor=20.0,
    )
    vit = CLIPVisionModel(config).eval()
    assert vit.config.hidden_act == "quick_gelu"
    pixels = torch.randn(2, 3, 56, 56)
    expected = vit(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(VisionEncoder(vit, feature_layer=-2)(pixels), expected, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.inference_mode()
def test_a_resized_encoder_reads_larger_images_as_transformers_does(model_type: str) -> None:
    vit = build_vit(model_type)
    pixels = torch.randn(2, 3, 48, 48)
    options = {} if model_type == "dinov2" else {"interpolate_pos_encoding": True}
    expected = vit(pixel_values=pixels, output_hidden_states=True, **options).hidden_states[-2]
    encoder = VisionEncoder(vit, feature_layer=-2)
    num_image_tokens = encoder.num_image_tokens
    encoder.resize(48)
    assert (encoder.image_size, encoder.num_image_tokens) == (48, num_image_tokens + 36 - 16)
    features = encoder(pixels)
    if model_type == "clip_vision_model":  # the authors of BLIP-2 align the corners of CLIP's grid
        assert not torch.allclose(features, expected, atol=1e-3)
    else:
        torch.testing.assert_close(features, expected)


def test_corners_of_a_clip_grid_stay_what_they_were() -> None:
    encoder = VisionEncoder(build_vit("clip_vision_model"))
    before = encoder.vit.state_dict()["embeddings.position_embedding.weight"]
    encoder.resize(64)
    after = encoder.vit.state_dict()["embeddings.position_embedding.weight"]
    for row in (0, 1, -1):  # class token, first and last corner
        torch.testing.assert_close(after[row], before[row])


def test_a_size_that_is_no_multiple_of_the_patch_size_is_refused() -> None:
    encoder = VisionEncoder(build_vit("vit"))
    with pytest.raises(ValueError, match=r"image size 45 is no multiple of the patch size 8; .* 48"):
        encoder.resize(45)
