"""The frozen image encoder."""

from model.vision.encoder import (
    FAMILIES,
    VisionEncoder,
    VisionFamily,
    build_empty_encoder,
    build_vision_encoder,
)

__all__ = ["FAMILIES", "VisionEncoder", "VisionFamily", "build_empty_encoder", "build_vision_encoder"]
