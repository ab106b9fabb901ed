"""The frozen image encoder: normalised pixels in, one feature per image token out."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from model.vision import cpu_attention
from model.vision.families import FAMILIES, VisionFamily

MAX_ROWS = 256  # of patches, each with one position embedding
_STAGES = ("stage_names", "out_features", "out_indices")
_PROVENANCE = ("_name_or_path", "architectures", "dtype", "initializer_range", "transformers_version")


class VisionEncoder(nn.Module):
    """A vision transformer of one of `FAMILIES`, without its final norm.

    `ln_vision` of the Q-Former's checkpoint takes the place of that norm: it is trained and stored with
    the Q-Former, so two Q-Formers can share one encoder and one set of image features.

    vit: transformers' model. feature_layer: the layer whose output is returned, counted from the end; the
    layers behind it are dropped. -1 for a checkpoint that uses the second-last layer (paper, section 3.4) and
    was saved without the last.

    image_size: S. hidden_size: V. num_image_tokens: P, the class token included. layer_norm_eps: the
    epsilon of the encoder's norms, which `ln_vision` shares.
    """

    def __init__(self, vit: PreTrainedModel, *, feature_layer: int = -1) -> None:
        super().__init__()
        setattr(_backbone(vit), FAMILIES[vit.config.model_type].final_norm, nn.Identity())
        _drop_pooler(vit)
        _drop_layers(vit, behind=feature_layer)
        self.vit = vit
        self.image_size: int = vit.config.image_size
        self.hidden_size: int = vit.config.hidden_size
        self.layer_norm_eps: float = vit.config.layer_norm_eps

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vit.parameters()).dtype

    @property
    def backbone(self) -> nn.Module:
        """The module with embeddings, layers and final norm, which some releases wrap once more."""
        return _backbone(self.vit)

    @property
    def num_image_tokens(self) -> int:
        _, positions = _find_position_embeddings(_embeddings(self.vit))
        return positions.shape[-2]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode [B, 3, S, S] normalised images of any floating type into [B, P, V] image features."""
        image_features: Tensor = self.vit(pixel_values=pixel_values.to(self.dtype)).last_hidden_state
        return image_features  # [B, P, V]

    def use_cpu_attention(self) -> None:
        """Switch to the attention of `model.vision.cpu_attention`, which is for bfloat16 on a CPU."""
        self.vit.set_attn_implementation(cpu_attention.NAME)

    def is_equal(self, other: "VisionEncoder") -> bool:
        """Return whether both compute the same features: equal type, configuration and weights."""
        if self.dtype != other.dtype or not _has_equal_config(self.vit.config, other.vit.config):
            return False
        theirs = other.vit.state_dict()
        ours = self.vit.state_dict()
        return ours.keys() == theirs.keys() and all(
            torch.equal(tensor, theirs[name].to(tensor.device)) for name, tensor in ours.items()
        )

    def resize(self, image_size: int) -> None:
        """Change the image size: the position embeddings are interpolated, bicubically.

        Raises ValueError where the size is no multiple of the patch size, or above MAX_ROWS patches.
        """
        config = self.vit.config
        if image_size % config.patch_size:
            raise ValueError(
                f"image size {image_size} is no multiple of the patch size {config.patch_size}; the nearest "
                f"that is one is {max(1, round(image_size / config.patch_size)) * config.patch_size}"
            )
        if image_size == self.image_size:
            return
        if not 1 <= image_size // config.patch_size <= MAX_ROWS:
            raise ValueError(
                f"image size {image_size} is out of range; with patches of {config.patch_size} px, "
                f"{config.patch_size} to {MAX_ROWS * config.patch_size} px can be read: choose one of these"
            )
        embeddings = _embeddings(self.vit)
        tensors = embeddings.state_dict()
        name, positions = _find_position_embeddings(embeddings)
        tensors[name] = _resize_position_embeddings(
            positions.detach(), image_size // config.patch_size, FAMILIES[config.model_type]
        )
        config.image_size = self.image_size = image_size
        self._replace_embeddings(tensors)

    def compute_buffers(self) -> None:
        """Compute the buffers of an encoder that was built on "meta", once its weights are loaded."""
        self._replace_embeddings(_embeddings(self.vit).state_dict())

    def _replace_embeddings(self, tensors: Mapping[str, Tensor]) -> None:
        former = _embeddings(self.vit)
        embeddings = type(former)(self.vit.config)
        embeddings.load_state_dict(dict(tensors), assign=True)
        embeddings.train(former.training).requires_grad_(next(former.parameters()).requires_grad)
        self.backbone.embeddings = embeddings


def build_vision_encoder(config: PreTrainedConfig, *, attn_implementation: str = "sdpa") -> VisionEncoder:
    """Build an encoder with fresh weights, of the family that `config` belongs to.

    attn_implementation: "sdpa", or "eager", which is the faster one for training in bfloat16 on a CPU.
    """
    vit_class = FAMILIES[config.model_type].vit_class
    own_config = copy.deepcopy(config)  # the encoder changes it
    return VisionEncoder(vit_class._from_config(own_config, attn_implementation=attn_implementation))


def _has_equal_config(config: PreTrainedConfig, other: PreTrainedConfig) -> bool:
    """Compare all fields that an encoder's output depends on."""
    known = type(config)().to_dict().keys() - set(_PROVENANCE)  # files carry leftovers of other models
    ours, theirs = ({key: each.to_dict().get(key) for key in known} for each in (config, other))
    return config.model_type == other.model_type and ours == theirs


def _backbone(vit: PreTrainedModel) -> nn.Module:
    backbone: nn.Module = getattr(vit, "vision_model", vit)
    return backbone


def _embeddings(vit: PreTrainedModel) -> nn.Module:
    embeddings = _backbone(vit).embeddings
    assert isinstance(embeddings, nn.Module)
    return embeddings


def _drop_pooler(vit: PreTrainedModel) -> None:
    """Remove the layers that pool an image into one vector, which nothing here uses."""
    backbone = _backbone(vit)
    if isinstance(getattr(backbone, "pooler", None), nn.Module):  # ViT
        setattr(backbone, "pooler", None)  # noqa: B010 - torch knows no type for it
    if isinstance(getattr(backbone, "head", None), nn.Module):  # SigLIP
        del backbone.head
        setattr(backbone, "use_head", False)  # noqa: B010
        vit.config.vision_use_head = False


def _drop_layers(vit: PreTrainedModel, *, behind: int) -> None:
    count: int = vit.config.num_hidden_layers
    if not -count <= behind <= -1:
        raise ValueError(f"feature layer {behind} is not between {-count}, the first, and -1, the last")
    layers = next(each for each in vit.modules() if isinstance(each, nn.ModuleList) and len(each) == count)
    del layers[count + 1 + behind :]
    vit.config.num_hidden_layers = len(layers)
    if hasattr(vit.config, "stage_names"):  # a backbone's, whose stages are made of the number of layers
        kept = {key: value for key, value in vit.config.to_dict().items() if key not in _STAGES}
        vit.config = type(vit.config).from_dict(kept)


def _find_position_embeddings(embeddings: nn.Module) -> tuple[str, Tensor]:
    """Return the position embeddings, [P, V] or [1, P, V], and their name in the embeddings module."""
    return next((name, table) for name, table in embeddings.named_parameters() if "position_embed" in name)


def _resize_position_embeddings(positions: Tensor, num_rows: int, vision_family: VisionFamily) -> Tensor:
    """Interpolate the grid of position embeddings to `num_rows` rows and columns, bicubically.

    positions: [P, V] or [1, P, V]. Those of class tokens, in front, stay as they are.
    """
    class_positions = positions[..., : vision_family.num_class_tokens, :]
    patch_positions = positions[..., vision_family.num_class_tokens :, :]
    old_rows = round(patch_positions.shape[-2] ** 0.5)
    grid = patch_positions.reshape(1, old_rows, old_rows, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(
        grid, size=(num_rows, num_rows), mode="bicubic", align_corners=vision_family.align_corners
    )  # [1, V, R, R]
    resized = grid.permute(0, 2, 3, 1).reshape(*positions.shape[:-2], num_rows**2, -1)
    return torch.cat([class_positions, resized.to(positions)], dim=-2)
