"""The supported families of vision transformers."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import (
    Blip2VisionModel,
    CLIPVisionModel,
    Dinov2Model,
    PreTrainedModel,
    SiglipVisionModel,
    ViTModel,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionFamily:
    """The properties of one kind of vision transformer.

    final_norm: the norm behind the last layer. num_class_tokens: tokens in front of the patches'.
    align_corners: how position embeddings are resized to another image size; as the authors of BLIP-2 do for
    EVA's and CLIP's encoders, as `transformers` does for the others. half: the 16-bit type that its authors
    ran it in.
    """

    vit_class: type[PreTrainedModel]
    final_norm: str
    num_class_tokens: int = 1
    align_corners: bool = False
    half: torch.dtype = torch.bfloat16


FAMILIES: Mapping[str, VisionFamily] = {
    "blip_2_vision_model": VisionFamily(
        vit_class=Blip2VisionModel, final_norm="post_layernorm", half=torch.float16
    ),
    "clip_vision_model": VisionFamily(
        vit_class=CLIPVisionModel, final_norm="post_layernorm", align_corners=True, half=torch.float16
    ),
    "siglip_vision_model": VisionFamily(
        vit_class=SiglipVisionModel, final_norm="post_layernorm", num_class_tokens=0
    ),
    "vit": VisionFamily(vit_class=ViTModel, final_norm="layernorm"),
    "dinov2": VisionFamily(vit_class=Dinov2Model, final_norm="layernorm"),
}
