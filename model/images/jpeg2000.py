"""The header of a JPEG 2000 file, a codestream alone or in boxes: size, memory and depth."""

import struct
from typing import Final

from model.errors import InvalidImageFileError
from model.images.isobmff import by_kind

CODESTREAM: Final = b"\xff\x4f\xff\x51"  # start, and the marker of the size
MAX_TILES: Final = 10_000
_MAX_PARTS: Final = 100_000  # of all tiles
_START_OF_TILE, _END = 0xFF90, 0xFFD9
_TILE_BYTES: Final = 16_384  # of OpenJPEG's own records of a tile
_SHALLOWEST, _DEEPEST = 8, 16
_MAX_COMPONENTS: Final = 4


def read_jpeg2000(data: bytes) -> tuple[int, int, int, int, int]:
    """Return width, height, bytes of the image and of its decoder's buffers, and bits per sample in Pillow.

    Raises InvalidImageFileError for too many tiles, and for samples that are not read; struct.error,
    LookupError or ArithmeticError for damage.
    """
    start = 0 if data.startswith(CODESTREAM) else by_kind(data, 0, len(data), until=b"jp2c")[b"jp2c"][0]
    right, bottom, left, top, *tiles, num_components = struct.unpack_from(">8IH", data, start + 8)
    tile_width, tile_height, first_left, first_top = tiles
    num_tiles = -(-(right - first_left) // tile_width) * -(-(bottom - first_top) // tile_height)
    if num_tiles > MAX_TILES:
        raise InvalidImageFileError(
            f"the JPEG 2000 has {num_tiles} tiles, the limit is {MAX_TILES}; save it with larger ones"
        )
    _check_tiles(data, start, num_tiles)
    if num_components > _MAX_COMPONENTS:
        raise InvalidImageFileError(
            f"the JPEG 2000 has {num_components} components, the limit is {_MAX_COMPONENTS}; "
            "convert it to RGB"
        )
    components = struct.unpack_from(f">{3 * num_components}B", data, start + 42)
    depths = [(depth & 0x7F) + 1 for depth in components[::3]]
    if not _SHALLOWEST <= min(depths) <= max(depths) <= _DEEPEST:
        raise InvalidImageFileError(
            f"the JPEG 2000 has {' and '.join(map(str, dict.fromkeys(depths)))} bits per sample, "
            f"and {_SHALLOWEST} to {_DEEPEST} are read; convert it to 8 bits"
        )
    width, height = right - left, bottom - top
    sample_bytes = 1 if max(depths) == _SHALLOWEST else 2
    image_bytes = width * height * (sample_bytes if num_components == 1 else 4)
    tile_px = min(width, tile_width) * min(height, tile_height)
    # A tile in 32 bits, and in the depth of the file. Pillow scales grey of more than 8 bits to 16.
    buffer_bytes = num_components * (4 + sample_bytes) * tile_px + width * height + _TILE_BYTES * num_tiles
    return width, height, image_bytes, buffer_bytes, 8 * sample_bytes


def _check_tiles(data: bytes, start: int, num_tiles: int) -> None:
    """Raise InvalidImageFileError where tiles are missing, which OpenJPEG leaves black."""
    found = set[int]()
    position = start + 2
    for _ in range(_MAX_PARTS):
        (marker,) = struct.unpack_from(">H", data, position)
        if marker == _END:
            break
        if marker == _START_OF_TILE:
            tile, num_bytes = struct.unpack_from(">HI", data, position + 4)
            found.add(tile)
            if num_bytes == 0:  # up to the end
                break
        else:
            num_bytes = 2 + struct.unpack_from(">H", data, position + 2)[0]
        position += max(4, num_bytes)
    if len(found) < num_tiles:
        raise InvalidImageFileError(
            f"the JPEG 2000 has {len(found)} of its {num_tiles} tiles, or too many parts; send the file whole"
        )
