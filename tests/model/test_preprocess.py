"""Preprocessing: pixels equal those of the reference, bit for bit."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from transformers.image_utils import load_image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from model.images.decoding import decode_image
from model.preprocess import ImagePreprocessor


def random_image(mode: str, size: tuple[int, int]) -> Image.Image:
    """Return noise in any mode; partly transparent where the mode has an alpha channel."""
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


def test_16_bits_are_converted_as_transformers_converts_them() -> None:
    # Which clips all above 255; what serves images scales them first, see `decode_image`.
    levels = np.random.default_rng(0).integers(0, 2**16, (40, 30), dtype=np.uint16)
    image = Image.fromarray(levels)
    assert image.mode == "I;16"
    expected = BlipImageProcessorPil(size={"height": 64, "width": 64})(image, return_tensors="pt")
    assert torch.equal(ImagePreprocessor(64)(image), expected["pixel_values"][0])


def test_16_bits_of_each_color_and_scaled_grey_are_those_of_transformers(tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 2**16, (40, 30), dtype=np.uint16)
    reference = BlipImageProcessorPil(size={"height": 64, "width": 64})
    with Image.open(io.BytesIO(png_of_48_bits(levels))) as image:
        expected = reference(load_image(image), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(ImagePreprocessor(64)(decode_image(png_of_48_bits(levels), 64)), expected)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    scaled = Image.fromarray((levels >> 8).astype(np.uint8))
    expected = reference(scaled, return_tensors="pt")["pixel_values"][0]
    deep = decode_image((tmp_path / "deep.png").read_bytes(), 64)
    assert torch.equal(ImagePreprocessor(64)(deep), expected)


def png_of_48_bits(levels: np.ndarray) -> bytes:
    """Build a PNG with 16 bits for each of red, green and blue, which Pillow reads but does not write."""
    height, width = levels.shape
    rows = np.repeat(levels[..., None], 3, axis=2).astype(">u2").reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(raw)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_is_upright_as_transformers_loads_it(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / "photograph.jpg"
    random_image("RGB", (60, 40)).save(path, exif=exif)
    reference = BlipImageProcessorPil(size={"height": 64, "width": 64})
    expected = reference(load_image(str(path)), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(ImagePreprocessor(64)(decode_image(path.read_bytes(), 64)), expected)


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
