"""Position embeddings of vision transformers, resized to other image sizes."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.vision.families import VisionFamily


def find_position_embeddings(embeddings: nn.Module) -> tuple[str, Tensor]:
    """Return the position embeddings, [P, V] or [1, P, V], and their name in the embeddings module."""
    return next((name, table) for name, table in embeddings.named_parameters() if "position_embed" in name)


def resize_position_embeddings(positions: Tensor, num_rows: int, vision_family: VisionFamily) -> Tensor:
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
