"""The frozen image encoder: normalised pixels in, one feature per image token out."""

import torch
from torch import Tensor, nn
from transformers import Blip2VisionConfig, Blip2VisionModel


class VisionEncoder(nn.Module):
    """A vision tower without its final norm.

    `ln_vision` of the Q-Former's checkpoint takes the place of that norm: it is trained and stored with
    the Q-Former, so two Q-Formers can share one tower and one set of image features. All layers of the tower
    run: a checkpoint that uses the second-last layer (paper, section 3.4) was saved without the last.

    image_size: S. hidden_size: V. num_image_tokens: P, the class token included. layer_norm_eps: the
    epsilon of the tower's norms, which `ln_vision` shares.
    """

    def __init__(self, tower: Blip2VisionModel) -> None:
        super().__init__()
        tower.post_layernorm = nn.Identity()
        self.tower = tower
        self.image_size: int = tower.config.image_size
        self.hidden_size: int = tower.config.hidden_size
        self.num_image_tokens: int = tower.embeddings.num_positions
        self.layer_norm_eps: float = tower.config.layer_norm_eps

    @property
    def dtype(self) -> torch.dtype:
        return self.tower.embeddings.patch_embedding.weight.dtype

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Turns [B, 3, S, S] normalised images of any floating type into [B, P, V] image features."""
        image_features: Tensor = self.tower(pixel_values=pixel_values.to(self.dtype)).last_hidden_state
        return image_features  # [B, P, V]


def build_vision_encoder(config: Blip2VisionConfig, *, attn_implementation: str = "sdpa") -> VisionEncoder:
    """Builds a tower with fresh weights.

    attn_implementation: "sdpa", or "eager", which is the faster one for training in bfloat16 on a CPU.
    """
    return VisionEncoder(Blip2VisionModel._from_config(config, attn_implementation=attn_implementation))
