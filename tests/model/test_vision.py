"""The frozen image encoder."""

import pytest
import torch
from transformers import Blip2VisionModel

from model.vision import VisionEncoder, build_vision_encoder
from tests.builders import IMAGE_SIZE, build_vision_config, random_pixels


@torch.inference_mode()
def test_features_are_those_before_the_final_norm() -> None:
    torch.manual_seed(0)
    tower = Blip2VisionModel(build_vision_config()).eval()
    torch.nn.init.normal_(tower.post_layernorm.weight)
    final_norm = tower.post_layernorm
    normed = tower(pixel_values=random_pixels(2)).last_hidden_state
    image_features = VisionEncoder(tower)(random_pixels(2))
    assert not torch.allclose(image_features, normed, atol=0.1)
    torch.testing.assert_close(final_norm(image_features), normed)


@torch.inference_mode()
def test_both_kinds_of_attention_give_the_same_features() -> None:
    torch.manual_seed(0)
    eager = build_vision_encoder(build_vision_config(), attn_implementation="eager").eval()
    sdpa = build_vision_encoder(build_vision_config()).eval()
    sdpa.load_state_dict(eager.state_dict())
    assert eager.tower.config._attn_implementation == "eager"
    assert sdpa.tower.config._attn_implementation == "sdpa"
    torch.testing.assert_close(eager(random_pixels(2)), sdpa(random_pixels(2)), rtol=0, atol=1e-4)


def test_sizes_are_those_of_the_tower() -> None:
    encoder = build_vision_encoder(build_vision_config())
    assert (encoder.image_size, encoder.hidden_size) == (IMAGE_SIZE, 48)
    assert encoder.num_image_tokens == encoder(random_pixels(1)).shape[1] == 17


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_pixels_are_cast_to_the_type_of_the_weights(dtype: torch.dtype) -> None:
    encoder = build_vision_encoder(build_vision_config()).to(dtype)
    assert encoder(random_pixels(1)).dtype == encoder.dtype == dtype
