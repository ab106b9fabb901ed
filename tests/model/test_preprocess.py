"""Pixels: bit for bit those of the reference."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from model.preprocess import ImagePreprocessor


def random_image(mode: str, size: tuple[int, int]) -> Image.Image:
    """Noise in any mode; with transparent places where the mode has an alpha channel."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA") if mode == "RGBA" else Image.fromarray(pixels[..., :3], "RGB")
    return image if mode == "RGBA" else image.convert(mode)


@pytest.mark.parametrize("size", [(96, 96), (133, 57), (20, 300), (1, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA", "1", "CMYK"])
def test_pixels_equal_those_of_transformers_to_the_bit(mode: str, size: tuple[int, int]) -> None:
    image = random_image("RGB", size).convert(mode) if mode != "RGBA" else random_image(mode, size)
    reference = BlipImageProcessorPil(size={"height": 64, "width": 64})
    expected = reference(image, return_tensors="pt")["pixel_values"][0]
    pixel_values = ImagePreprocessor(64)(image)
    assert pixel_values.dtype == torch.float32
    assert torch.equal(pixel_values, expected)


def test_a_palette_with_a_transparent_colour_turns_white_there() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([200, 10, 10] + [0, 0, 0] * 255)
    image.info["transparency"] = 0
    preprocess = ImagePreprocessor(8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    assert (preprocess(image) == 1.0).all()


def test_mean_and_deviation_are_applied_per_channel() -> None:
    preprocess = ImagePreprocessor(2, mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    pixel_values = preprocess(Image.new("RGB", (5, 3), (255, 255, 255)))
    assert pixel_values.shape == (3, 2, 2)
    assert pixel_values[:, 0, 0].tolist() == [1.0, 1.0, 0.0]
