"""From a decoded image to a square of pixels, in bands: no copy of the whole image is made."""

from collections.abc import Iterator, Sequence
from typing import Final

from PIL import Image

BAND_PX: Final = 2**17  # about 10 MiB with all that a band is converted into
_TRANSPOSES: Final = {  # by the orientation in EXIF
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES: Final = (5, 6, 7, 8)
_FROM_THE_END: Final = (3, 4, 7, 8)  # the first band of the upright image is the last one of the stored image


def resize_to_square(
    image: Image.Image,
    side: int,
    *,
    orientation: int = 1,
    levels: Sequence[int] | None = None,
    band_px: int = BAND_PX,
) -> Image.Image:
    """Return the upright image as RGB, [side, side], by bicubic interpolation; transparency becomes white.

    orientation: as in EXIF. levels: the 8-bit level of each of 65,536, for samples of up to 16 bits.
    Equal to the resizing of the whole upright image, bit for bit: Pillow resizes each row by itself, and
    then the columns. Of a tall image it resizes the columns first, so that one is put together before.
    """
    width, height = image.size if orientation not in _SWAPS_SIDES else image.size[::-1]
    if image.mode == "RGB" and orientation not in _TRANSPOSES and image.info.get("transparency") is None:
        return image.resize((side, side), Image.Resampling.BICUBIC)
    resizes_rows_first = not is_tall(width, height, side)
    together = Image.new("RGB", (side if resizes_rows_first else width, height))
    top = 0
    band_px *= 1 if levels is None else 8  # `point` reads all levels anew for each band
    for band in _upright_bands(image, max(1, band_px // width), orientation):
        grey = band if levels is None else band.convert("I").point(levels, "L")
        narrow = to_rgb(grey).resize((together.width, band.height), Image.Resampling.BICUBIC)
        together.paste(narrow, (0, top))
        top += band.height
    return together.resize((side, side), Image.Resampling.BICUBIC)


def is_tall(width: int, height: int, side: int) -> bool:
    """Return whether Pillow resizes the columns before the rows: since version 13; earlier ones never do."""
    return height > side and height - side > 2 * (width - side)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, on white where it is transparent."""
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _upright_bands(image: Image.Image, num_rows: int, orientation: int) -> Iterator[Image.Image]:
    """Yield the rows of the upright image from top to bottom, `num_rows` at a time."""
    width, height = image.size
    length = width if orientation in _SWAPS_SIDES else height
    transpose = _TRANSPOSES.get(orientation)
    for start in range(0, length, num_rows):
        end = min(start + num_rows, length)
        first, last = (length - end, length - start) if orientation in _FROM_THE_END else (start, end)
        box = (first, 0, last, height) if orientation in _SWAPS_SIDES else (0, first, width, last)
        band = image if box == (0, 0, width, height) else image.crop(box)
        yield band if transpose is None else band.transpose(transpose)
