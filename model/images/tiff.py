"""The header of a TIFF file: size, memory, and the number of its tiles or strips."""

import struct
from dataclasses import dataclass
from typing import Final

from model.errors import InvalidImageFileError

MAX_TILES: Final = 65_536  # or strips
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_STRIPS, _ORIENTATION, _SAMPLES, _ROWS_PER_STRIP, _STRIP_BYTES = 273, 274, 277, 278, 279
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 322, 323, 324, 325
_YCBCR: Final = 6
_UNCOMPRESSED: Final = 1
_FORMATS: Final = {1: "B", 3: "H", 4: "I"}  # of integers, by the type of a tag


@dataclass(frozen=True, slots=True)
class Tag:
    """count: how many values there are; value: the first one."""

    count: int
    value: int


def read_tiff(data: bytes) -> tuple[int, int, int, int, int, bool]:
    """Return width, height, bytes of the image and of buffers, bits per sample, and whether 0 means white.

    Raises InvalidImageFileError for too many tiles or strips, struct.error or LookupError for damage.
    """
    tags = _read_tags(data)
    for tag in (_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES):
        if tag in tags and tags[tag].count > MAX_TILES:
            raise InvalidImageFileError(
                f"the TIFF has {tags[tag].count} tiles or strips, the limit is {MAX_TILES}; "
                "save it with larger ones"
            )
    width, height = tags[_WIDTH].value, tags[_HEIGHT].value
    depth, num_samples = (tags[tag].value if tag in tags else 1 for tag in (_BITS, _SAMPLES))
    pixel_bytes = (depth + 7) // 8 if num_samples == 1 else 4  # in Pillow
    if tags.get(_ORIENTATION, Tag(1, 1)).value != 1:
        pixel_bytes *= 2  # Pillow rotates a copy
    image_bytes, buffer_bytes = width * height * pixel_bytes, _buffer_bytes(tags, depth * num_samples)
    is_white_zero = tags.get(_PHOTOMETRIC, Tag(1, 0)).value == 0
    return width, height, image_bytes, buffer_bytes, depth, is_white_zero


def _read_tags(data: bytes) -> dict[int, Tag]:
    """Read the integer tags of the first directory; of equal ones the first counts, as in Pillow."""
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(order + "I", data, 4)
    (num_tags,) = struct.unpack_from(order + "H", data, start)
    entries = data[start + 2 : start + 2 + 12 * num_tags]
    tags: dict[int, Tag] = {}
    for position in range(0, len(entries) - 11, 12):
        tag, kind, count = struct.unpack_from(order + "HHI", entries, position)
        letter = _FORMATS.get(kind)
        if letter is None or tag in tags or count == 0:
            continue
        is_inside = count * struct.calcsize(letter) <= 4
        (offset,) = struct.unpack_from(order + "I", entries, position + 8)
        source, place = (entries, position + 8) if is_inside else (data, offset)
        if place + struct.calcsize(letter) <= len(source):
            tags[tag] = Tag(count, struct.unpack_from(order + letter, source, place)[0])
    return tags


def _buffer_bytes(tags: dict[int, Tag], pixel_bits: int) -> int:
    """Compute the size of the buffers for one tile or strip, beside the image."""
    if tags.get(_COMPRESSION, Tag(1, _UNCOMPRESSED)).value == _UNCOMPRESSED:
        return 0
    width, height = tags[_WIDTH].value, tags[_HEIGHT].value
    if _TILE_WIDTH in tags and _TILE_HEIGHT in tags:
        num_pixels = tags[_TILE_WIDTH].value * tags[_TILE_HEIGHT].value
    else:
        num_pixels = width * min(height, tags.get(_ROWS_PER_STRIP, Tag(1, height)).value)
    if tags.get(_PHOTOMETRIC, Tag(1, 0)).value == _YCBCR:
        pixel_bits += 32  # converted by libtiff, a strip at a time
    return num_pixels * pixel_bits // 8
