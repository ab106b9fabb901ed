"""Image decoding: bytes to an upright image to its pixels, in CPU threads. Bad input fails here.

Formats: JPEG, PNG, WebP, GIF and TIFF (their first frame), BMP. 16-bit grey is scaled to 8 bits; the
orientation in EXIF is applied; transparency turns white.
"""

import asyncio
import binascii
import hashlib
import io
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

import torch
from PIL import Image
from torch import Tensor

from model.errors import InvalidPixelsError
from model.preprocess import DAMAGE, make_upright, resize_to_square
from service.errors import ImageTooLargeError, InvalidImageError, UnsupportedImageError

# To be increased when the same file would be decoded into other pixels than before.
PREPROCESS_VERSION: Final = "1"

_SIGNATURES: Final = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "WEBP": (b"RIFF",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "TIFF": (b"II*\x00", b"MM\x00*"),
    "BMP": (b"BM",),
}
_DATA_URI: Final = re.compile(r"data:[\w.+/-]*(?:;[\w.+=-]+)*?;base64,", re.ASCII)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file as it was received, its header checked; digest: the SHA-256 of its bytes, in hex."""

    data: bytes
    digest: str


class ImageDecoder:
    """Reads and decodes image files in `num_threads` threads."""

    def __init__(self, *, max_bytes: int, max_pixels: int, num_threads: int) -> None:
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        # Pillow's own limit is process-wide and only warns up to twice its value; here it is checked always.
        Image.MAX_IMAGE_PIXELS = None
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="image-decoder")

    async def read(self, source: str | bytes) -> ImageFile:
        """Read base64, a data URI, or the bytes themselves, and check the header.

        Raises ImageTooLargeError (413), UnsupportedImageError (415) or InvalidImageError (422).
        """
        return await self._in_thread(self._read, source)

    async def decode_pixels(self, file: ImageFile, image_size: int) -> Tensor:
        """Decode a file into [S, S, 3] uint8 pixels. Raises InvalidImageError where the file is damaged."""
        return await self._in_thread(self._decode_pixels, file, image_size)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def _read(self, source: str | bytes) -> ImageFile:
        if isinstance(source, str):
            source = self._decode_base64(source)
        self._check_size(len(source))
        check_header(source, self._max_pixels)
        return ImageFile(source, hashlib.sha256(source).hexdigest())

    def _decode_pixels(self, file: ImageFile, image_size: int) -> Tensor:
        try:
            return torch.from_numpy(resize_to_square(decode_image(file.data), image_size))
        except InvalidImageError:
            raise
        except DAMAGE as exc:
            raise InvalidImageError(f"the image is damaged ({exc}); send the file whole") from exc

    def _decode_base64(self, source: str) -> bytes:
        if match := _DATA_URI.match(source):
            source = source[match.end() :]
        elif source.startswith("data:"):
            raise InvalidImageError("the data: URI is not base64; write it as data:image/png;base64,…")
        elif source.startswith(("http://", "https://")):
            raise InvalidImageError("image URLs are not fetched here; send the file itself, in base64")
        self._check_size(len(source) * 3 // 4 - source[-2:].count("="))
        try:
            return binascii.a2b_base64(source, strict_mode=True)
        except (binascii.Error, ValueError) as exc:
            raise InvalidImageError(
                f"the image is not base64 ({exc}); use the standard alphabet with padding and no line breaks"
            ) from exc

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise ImageTooLargeError(
                f"the image file has {num_bytes} bytes, the limit is {self._max_bytes}; "
                "compress or downscale it"
            )


def check_header(data: bytes, max_pixels: int) -> None:
    """Check the format and the size in the header of an image file, without decoding it.

    Raises UnsupportedImageError for a format that is not read, InvalidImageError for too many pixels.
    """
    if not data:
        raise InvalidImageError("the image is empty; send the bytes of a file")
    name = _sniff(data)
    if name is None:
        raise UnsupportedImageError(
            f"the file is none of {', '.join(_SIGNATURES)}; convert it to one of them"
        )
    try:
        with Image.open(io.BytesIO(data), formats=(name,)) as image:
            width, height = image.size
    except DAMAGE as exc:
        raise InvalidImageError(
            f"the file begins as {name}, but its header is damaged; send it whole"
        ) from exc
    if width * height > max_pixels:
        raise InvalidImageError(
            f"the image is {width} x {height} = {width * height / 1e6:.4g} Mpx, the limit is "
            f"{max_pixels / 1e6:.4g} Mpx; downscale it first"
        )


def decode_image(data: bytes) -> Image.Image:
    """Decode the first frame, upright, with at most 8 bits per channel, in whatever mode it then has.

    Raises what Pillow raises on a damaged file, and InvalidImageError for samples of 32 bits.
    """
    with Image.open(io.BytesIO(data), formats=tuple(_SIGNATURES)) as image:
        try:
            return make_upright(image)
        except InvalidPixelsError as exc:
            raise InvalidImageError(str(exc)) from exc


def _sniff(data: bytes) -> str | None:
    name = next((name for name, starts in _SIGNATURES.items() if data.startswith(starts)), None)
    if name == "WEBP" and data[8:12] != b"WEBP":  # RIFF holds sound and video too
        return None
    if name == "BMP" and data[6:10] != bytes(4):  # two letters are a weak signature: many texts begin so
        return None
    return name
