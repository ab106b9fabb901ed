"""The header of an image file: its format, its size, and the memory that decoding it takes.

Read from the bytes without a decoder, so that nothing is allocated before the limits are checked.
"""

import importlib.util
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from model.errors import InvalidImageFileError, UnknownImageFormatError
from model.images.isobmff import read_isobmff, sniff_isobmff
from model.images.jpeg import lacks_end, read_jpeg
from model.images.jpeg2000 import CODESTREAM, read_jpeg2000
from model.images.png import damaged_chunks, has_transparency
from model.images.resize import is_tall
from model.images.tiff import read_tiff

MAX_SIDE_PX: Final = 65_535  # of JPEG and GIF files; the weights of resizing grow with the side
SIGNATURES: Final = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "WEBP": (b"RIFF",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "TIFF": (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"),  # the last two: BigTIFF
    "BMP": (b"BM",),
    "JPEG2000": (CODESTREAM, b"\0\0\0\x0cjP  \r\n\x87\n"),
}
_OPTIONAL: Final = {  # the module that each needs, and where that comes from
    "AVIF": ("PIL._avif", "where Pillow is built with AVIF, as its wheels are"),
    "HEIC": ("pillow_heif", "where the extra heic is installed (pip install pillow-heif)"),
}
_BAND_BYTES: Final = 16 * 2**20  # of `resize`, with room for what allocators round up
_PNG_CHANNELS: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_IGNORED: Final = {"tRNS": "the transparency", "eXIf": "the orientation"}
_BMP_RLE: Final = (1, 2)


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """The format, the size and the memory of an image file.

    image_bytes: size of the decoded image in Pillow. buffer_bytes: what the decoder needs beside it.
    depth: bits per sample. is_white_zero: whether Pillow leaves it to us to invert the samples.
    """

    format: str
    width: int
    height: int
    image_bytes: int
    buffer_bytes: int = 0
    depth: int = 8
    is_white_zero: bool = False


def read_header(data: bytes) -> ImageHeader:
    """Read the header of an image file.

    Raises UnknownImageFormatError for a format that is not read, and InvalidImageFileError for a damaged
    header, and for a file of too many parts (JPEG scans and segments, TIFF tiles and strips).
    """
    name = sniff_format(data)
    try:
        return _READERS[name](data)
    except (struct.error, LookupError, ValueError, ArithmeticError) as exc:
        raise damaged_header(name) from exc


def find_warnings(data: bytes) -> tuple[str, ...]:
    """Return what the caller should know about a file that is damaged, but read.

    Raises UnknownImageFormatError for a format that is not read, InvalidImageFileError for too many chunks.
    """
    name = sniff_format(data)
    if name == "JPEG" and lacks_end(data):
        return ("the JPEG has no end marker and may be cut off; no pixels are missing",)
    kinds = damaged_chunks(data) if name == "PNG" else ()
    return tuple(
        f"the PNG's chunk {kind} has a wrong checksum; {_IGNORED[kind]} was ignored" for kind in kinds
    )


def sniff_format(data: bytes) -> str:
    """Return the format that the first bytes announce, or raise UnknownImageFormatError."""
    if not data:
        raise InvalidImageFileError("the image is empty; send the bytes of a file")
    name = next((name for name, starts in SIGNATURES.items() if data.startswith(starts)), None)
    name = name or sniff_isobmff(data)
    is_other_riff = name == "WEBP" and data[8:12] != b"WEBP"  # sound, video
    is_text = name == "BMP" and data[6:10] != bytes(4)  # two letters are a weak signature
    if name is None or is_other_riff or is_text:
        raise UnknownImageFormatError(
            f"the file is none of {', '.join([*SIGNATURES, *_OPTIONAL])}; convert it to one of them"
        )
    module, where = _OPTIONAL.get(name, ("", ""))
    if module and importlib.util.find_spec(module) is None:
        raise UnknownImageFormatError(
            f"the file is {name}, which is read {where}; or convert it to JPEG or PNG"
        )
    return name


def damaged_header(name: str) -> InvalidImageFileError:
    return InvalidImageFileError(
        f"the file begins as {name}, but its header is damaged or of a kind that is not read; "
        "send it whole, or save it again as PNG or JPEG"
    )


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise InvalidImageFileError where an image has no pixels, too many, or too long a side."""
    if width < 1 or height < 1:
        raise InvalidImageFileError(f"the image is {width} x {height} px and has no pixels; send another")
    if width * height > max_pixels:
        raise InvalidImageFileError(
            f"the image is {width} x {height} = {width * height / 1e6:.4g} Mpx, the limit is "
            f"{max_pixels / 1e6:.4g} Mpx; downscale it first"
        )
    if max(width, height) > MAX_SIDE_PX:
        raise InvalidImageFileError(
            f"the image is {width} x {height} px, the limit of a side is {MAX_SIDE_PX} px; "
            "cut it into pieces or downscale it first"
        )


def memory_of(header: ImageHeader, side: int, file_bytes: int) -> int:
    """Compute the most memory, in bytes, that decoding a file and resizing it to [side, side] takes.

    The file is counted twice: as it is received, and as it is copied for the decoder.
    """
    sizes = ((header.width, header.height), (header.height, header.width))  # EXIF may rotate it
    resized_px = max(height * (width if is_tall(width, height, side) else side) for width, height in sizes)
    return header.image_bytes + max(header.buffer_bytes, 4 * resized_px) + _BAND_BYTES + 2 * file_bytes


def _read_png(data: bytes) -> ImageHeader:
    if data[12:16] == b"CgBI":
        raise InvalidImageFileError(
            "the PNG is of Apple's own kind (CgBI, from an iPhone app), which is not read; "
            "save it again as a plain PNG"
        )
    width, height, depth, color_type, _, _, _ = struct.unpack_from(">2I5B", data, 16)
    channels = _PNG_CHANNELS[color_type]
    pixel_bytes = (2 if depth == 16 else 1) if channels == 1 else 4  # in Pillow
    # Beside the upper bytes of the samples: the lower ones, and which pixels are not transparent.
    buffer_bytes = 8 * width * height if channels == 3 and depth == 16 and has_transparency(data) else 0
    return ImageHeader("PNG", width, height, width * height * pixel_bytes, buffer_bytes, depth)


def _read_gif(data: bytes) -> ImageHeader:
    width, height = struct.unpack_from("<2H", data, 6)
    return ImageHeader("GIF", width, height, width * height, width * height)  # and what replaces the frame


def _read_bmp(data: bytes) -> ImageHeader:
    (header_bytes,) = struct.unpack_from("<I", data, 14)
    if header_bytes == 12:  # OS/2
        width, height, _, depth = struct.unpack_from("<4H", data, 18)
        compression = 0
    else:
        width, height, _, depth, compression = struct.unpack_from("<Ii2HI", data, 18)
    num_pixels = width * abs(height)
    buffer_bytes = 3 * num_pixels if compression in _BMP_RLE else 0  # an array that grows, and a copy of it
    return ImageHeader("BMP", width, abs(height), num_pixels * (4 if depth > 8 else 1), buffer_bytes)


def _read_webp(data: bytes) -> ImageHeader:
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(data[start : start + 3], "little") for start in (24, 27))
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<2H", data, 26))
    num_pixels = width * height
    return ImageHeader("WEBP", width, height, 4 * num_pixels, 8 * num_pixels)  # libwebp has two canvases


def _read_jpeg(data: bytes) -> ImageHeader:
    return ImageHeader("JPEG", *read_jpeg(data))


def _read_tiff(data: bytes) -> ImageHeader:
    return ImageHeader("TIFF", *read_tiff(data))


def _read_jpeg2000(data: bytes) -> ImageHeader:
    return ImageHeader("JPEG2000", *read_jpeg2000(data))


def _read_avif(data: bytes) -> ImageHeader:
    return ImageHeader("AVIF", *read_isobmff(data))


def _read_heic(data: bytes) -> ImageHeader:
    # pillow-heif scales grey of 10 and 12 bits to 16.
    return ImageHeader("HEIC", *read_isobmff(data), depth=16)


_READERS: Final[dict[str, Callable[[bytes], ImageHeader]]] = {
    "JPEG": _read_jpeg,
    "PNG": _read_png,
    "WEBP": _read_webp,
    "GIF": _read_gif,
    "TIFF": _read_tiff,
    "BMP": _read_bmp,
    "JPEG2000": _read_jpeg2000,
    "AVIF": _read_avif,
    "HEIC": _read_heic,
}
