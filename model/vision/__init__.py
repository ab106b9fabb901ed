"""The frozen image encoder."""

from model.vision.encoder import VisionEncoder, build_vision_encoder
from model.vision.families import FAMILIES, VisionFamily

__all__ = ["FAMILIES", "VisionEncoder", "VisionFamily", "build_vision_encoder"]
