"""Resizing in bands: equal to the plain way, bit for bit."""

import numpy as np
import pytest
from PIL import Image

from model.images.resize import resize_to_square, to_rgb

SIZES = [(96, 96), (133, 57), (57, 133), (20, 300), (300, 20), (1, 1), (300, 1), (1, 300), (48, 77)]
TRANSPOSES = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def variants(size: tuple[int, int]) -> list[Image.Image]:
    """Return noise in each mode that a decoder makes, with and without a transparent colour."""
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8))
    images = [rgba.convert(mode) for mode in ("RGB", "RGBA", "RGBX", "L", "LA", "1", "CMYK", "YCbCr")]
    images += [rgba.convert("RGB").convert("P"), rgba.convert("LA").convert("PA")]
    for image in [image for image in images if image.mode in ("RGB", "L", "1", "P")]:
        transparent = image.copy()
        transparent.info["transparency"] = image.getpixel((0, 0))
        images.append(transparent)
    return images


@pytest.mark.parametrize("orientation", TRANSPOSES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bands_are_equal_to_the_whole_to_the_bit(size: tuple[int, int], orientation: int) -> None:
    method = TRANSPOSES[orientation]
    for image in variants(size):
        upright = image if method is None else image.transpose(method)
        for side in (16, 48, 64):
            expected = to_rgb(upright).resize((side, side), Image.Resampling.BICUBIC)
            for band_px in (1, 300):
                resized = resize_to_square(image, side, orientation=orientation, band_px=band_px)
                assert resized.tobytes() == expected.tobytes(), (image.mode, side, band_px)
