"""The frozen image encoder: normalised pixels in, one feature per image token out."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Blip2VisionModel,
    CLIPVisionModel,
    Dinov2Model,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
    ViTModel,
)

from model.vision import cpu_attention as image_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionFamily:
    """What tells one kind of vision transformer from another.

    final_norm: the norm behind the last layer. num_class_tokens: tokens in front of the patches'.
    align_corners: how the position table is resized to another image size; as the authors of BLIP-2 do for
    EVA's and CLIP's encoders, as `transformers` does for the others. half: the type of 16 bits that its
    authors ran it in.
    """

    tower_class: type[PreTrainedModel]
    final_norm: str
    num_class_tokens: int = 1
    align_corners: bool = False
    half: torch.dtype = torch.bfloat16


_STAGES = ("stage_names", "out_features", "out_indices")
_PROVENANCE = ("_name_or_path", "architectures", "dtype", "initializer_range", "transformers_version")

FAMILIES: Mapping[str, VisionFamily] = {
    "blip_2_vision_model": VisionFamily(
        tower_class=Blip2VisionModel, final_norm="post_layernorm", half=torch.float16
    ),
    "clip_vision_model": VisionFamily(
        tower_class=CLIPVisionModel, final_norm="post_layernorm", align_corners=True, half=torch.float16
    ),
    "siglip_vision_model": VisionFamily(
        tower_class=SiglipVisionModel, final_norm="post_layernorm", num_class_tokens=0
    ),
    "vit": VisionFamily(tower_class=ViTModel, final_norm="layernorm"),
    "dinov2": VisionFamily(tower_class=Dinov2Model, final_norm="layernorm"),
}


class VisionEncoder(nn.Module):
    """A vision tower of one of `FAMILIES`, without its final norm.

    `ln_vision` of the Q-Former's checkpoint takes the place of that norm: it is trained and stored with
    the Q-Former, so two Q-Formers can share one tower and one set of image features.

    feature_layer: whose output the features are, counted from the end; the layers behind it are dropped. -1
    for a checkpoint that uses the second-last layer (paper, section 3.4) and was saved without the last.

    image_size: S. hidden_size: V. num_image_tokens: P, the class token included. layer_norm_eps: the
    epsilon of the tower's norms, which `ln_vision` shares.
    """

    def __init__(self, tower: PreTrainedModel, *, feature_layer: int = -1) -> None:
        super().__init__()
        family = FAMILIES[tower.config.model_type]
        setattr(_body(tower), family.final_norm, nn.Identity())
        _drop_pooler(tower)
        _drop_layers(tower, behind=feature_layer)
        self.tower = tower
        self.image_size: int = tower.config.image_size
        self.hidden_size: int = tower.config.hidden_size
        self.layer_norm_eps: float = tower.config.layer_norm_eps

    @property
    def dtype(self) -> torch.dtype:
        return next(self.tower.parameters()).dtype

    @property
    def body(self) -> nn.Module:
        """The module that holds embeddings, layers and final norm: some releases wrap it once more."""
        return _body(self.tower)

    @property
    def num_image_tokens(self) -> int:
        _, positions = _position_table(_embeddings(self.tower))
        return positions.shape[-2]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Turns [B, 3, S, S] normalised images of any floating type into [B, P, V] image features."""
        image_features: Tensor = self.tower(pixel_values=pixel_values.to(self.dtype)).last_hidden_state
        return image_features  # [B, P, V]

    def attend_by_products(self) -> None:
        """Switch to the attention of `model.vision.cpu_attention`, which is for bfloat16 on a CPU."""
        self.tower.set_attn_implementation(image_attention.NAME)

    def computes_as(self, other: "VisionEncoder") -> bool:
        """Whether both give the same features: of one kind and configuration, with equal weights."""
        if self.dtype != other.dtype or not _same_config(self.tower.config, other.tower.config):
            return False
        theirs = other.tower.state_dict()
        ours = self.tower.state_dict()
        return ours.keys() == theirs.keys() and all(
            torch.equal(tensor, theirs[name].to(tensor.device)) for name, tensor in ours.items()
        )

    def resize(self, image_size: int) -> None:
        """Makes the tower read images of another size: its position table is interpolated, bicubically.

        Raises ValueError where the size is no multiple of the patch size.
        """
        config = self.tower.config
        if image_size % config.patch_size:
            raise ValueError(
                f"image size {image_size} is no multiple of the patch size {config.patch_size}; the nearest "
                f"that is one is {max(1, round(image_size / config.patch_size)) * config.patch_size}"
            )
        if image_size == self.image_size:
            return
        embeddings = _embeddings(self.tower)
        tensors = embeddings.state_dict()
        name, positions = _position_table(embeddings)
        tensors[name] = _resize_positions(
            positions.detach(), image_size // config.patch_size, FAMILIES[config.model_type]
        )
        config.image_size = self.image_size = image_size
        resized = type(embeddings)(config)
        resized.load_state_dict(tensors, assign=True)
        resized.train(self.tower.training).requires_grad_(positions.requires_grad)
        self.body.embeddings = resized


def build_vision_encoder(config: PreTrainedConfig, *, attn_implementation: str = "sdpa") -> VisionEncoder:
    """Builds a tower with fresh weights, of the family that `config` belongs to.

    attn_implementation: "sdpa", or "eager", which is the faster one for training in bfloat16 on a CPU.
    """
    tower_class = FAMILIES[config.model_type].tower_class
    own = copy.deepcopy(config)  # the encoder changes it
    return VisionEncoder(tower_class._from_config(own, attn_implementation=attn_implementation))


def build_empty_encoder(config: PreTrainedConfig, *, attn_implementation: str = "sdpa") -> VisionEncoder:
    """Builds a tower to put weights into: on "meta", but for the embeddings, which hold a buffer too."""
    with torch.device("meta"):
        encoder = build_vision_encoder(config, attn_implementation=attn_implementation)
    encoder.body.embeddings = type(_embeddings(encoder.tower))(encoder.tower.config)
    return encoder


def _same_config(config: PreTrainedConfig, other: PreTrainedConfig) -> bool:
    """Whether all agrees that decides what a tower computes, whoever saved it."""
    known = type(config)().to_dict().keys() - set(_PROVENANCE)  # files carry leftovers of other models
    ours, theirs = ({key: each.to_dict().get(key) for key in known} for each in (config, other))
    return config.model_type == other.model_type and ours == theirs


def _body(tower: PreTrainedModel) -> nn.Module:
    body: nn.Module = getattr(tower, "vision_model", tower)
    return body


def _embeddings(tower: PreTrainedModel) -> nn.Module:
    embeddings = _body(tower).embeddings
    assert isinstance(embeddings, nn.Module)
    return embeddings


def _drop_pooler(tower: PreTrainedModel) -> None:
    """Removes what makes one vector of an image behind the last layer, which nothing here reads."""
    body = _body(tower)
    if isinstance(getattr(body, "pooler", None), nn.Module):  # ViT
        setattr(body, "pooler", None)  # noqa: B010 - torch knows no type for it
    if isinstance(getattr(body, "head", None), nn.Module):  # SigLIP
        del body.head
        setattr(body, "use_head", False)  # noqa: B010
        tower.config.vision_use_head = False


def _drop_layers(tower: PreTrainedModel, *, behind: int) -> None:
    count: int = tower.config.num_hidden_layers
    if not -count <= behind <= -1:
        raise ValueError(f"feature layer {behind} is not between {-count}, the first, and -1, the last")
    layers = next(part for part in tower.modules() if isinstance(part, nn.ModuleList) and len(part) == count)
    del layers[count + 1 + behind :]
    tower.config.num_hidden_layers = len(layers)
    if hasattr(tower.config, "stage_names"):  # a backbone's, whose stages are made of the number of layers
        kept = {key: value for key, value in tower.config.to_dict().items() if key not in _STAGES}
        tower.config = type(tower.config).from_dict(kept)


def _position_table(embeddings: nn.Module) -> tuple[str, Tensor]:
    """Gives the position embeddings, [P, V] or [1, P, V], and their name in the embeddings module."""
    return next((name, table) for name, table in embeddings.named_parameters() if "position_embed" in name)


def _resize_positions(positions: Tensor, num_rows: int, family: VisionFamily) -> Tensor:
    """Resizes the grid of a position table to `num_rows` rows and columns; class tokens keep their places."""
    of_class = positions[..., : family.num_class_tokens, :]
    of_patches = positions[..., family.num_class_tokens :, :]
    old_rows = round(of_patches.shape[-2] ** 0.5)
    grid = of_patches.reshape(1, old_rows, old_rows, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(
        grid, size=(num_rows, num_rows), mode="bicubic", align_corners=family.align_corners
    )  # [1, V, R, R]
    resized = grid.permute(0, 2, 3, 1).reshape(*positions.shape[:-2], num_rows**2, -1)
    return torch.cat([of_class, resized.to(positions)], dim=-2)
