"""Image files, read as the service reads them."""

from pathlib import Path
from typing import Final

from PIL import Image

from model.errors import ModelError
from model.images.decoding import decode_image
from training.data.records import DataError

MAX_FILE_BYTES: Final = 64 * 2**20
MAX_PIXELS: Final = 40_000_000  # the service's own default


def read_image(path: Path, side: int) -> Image.Image:
    """Return an image upright, RGB on white, resized to [side, side].

    Raises DataError where the file is missing, too large, damaged or of another format.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise DataError(f"{path} has more than {MAX_FILE_BYTES:,} bytes; make it smaller")
    try:
        return decode_image(data, side, max_pixels=MAX_PIXELS)
    except ModelError as error:
        raise DataError(f"{path}: {error}") from error
