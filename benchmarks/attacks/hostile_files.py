"""Image files that cost far more than their bytes suggest. All are generated; none is a photo."""

import io
import struct
import zlib
from collections.abc import Iterable

import numpy as np
from PIL import Image

_START_OF_SCAN = b"\xff\xda"
_END_OF_IMAGE = b"\xff\xd9"
_TIFF_LONG, _TIFF_SHORT = 4, 3
_BLOCK_BYTES = 2**20


def jpeg_of_many_scans(num_scans: int = 600, side: int = 2000) -> bytes:
    """Return a progressive JPEG whose last scan is repeated."""
    buffer = io.BytesIO()
    Image.new("L", (side, side), 128).save(buffer, "JPEG", progressive=True, quality=30)
    data = buffer.getvalue()
    last_scan = data[data.rindex(_START_OF_SCAN) : -len(_END_OF_IMAGE)]
    return data[: -len(_END_OF_IMAGE)] + last_scan * num_scans + _END_OF_IMAGE


def png(width: int, height: int, *, bit_depth: int = 8, colour_type: int = 0) -> bytes:
    """Return a valid PNG of zeros. colour_type: 0 grey, 2 RGB, 6 RGBA."""
    num_channels = {0: 1, 2: 3, 6: 4}[colour_type]
    num_bytes = height * (1 + (width * bit_depth * num_channels + 7) // 8)
    compressor = zlib.compressobj(9)
    blocks = (bytes(min(_BLOCK_BYTES, num_bytes - start)) for start in range(0, num_bytes, _BLOCK_BYTES))
    pixels = b"".join(map(compressor.compress, blocks)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def tiff_of_large_tile(side: int = 64, tile_side: int = 45_008) -> bytes:
    """Return a TIFF of a small image in one tile of gigabytes."""
    tags = [*_tiff_size(side), (322, _TIFF_LONG, 1, tile_side), (323, _TIFF_LONG, 1, tile_side)]
    return _tiff([*tags, (324, _TIFF_LONG, 1, 8), (325, _TIFF_LONG, 1, 64)], b"\0" * 64)


def tiff_of_many_tiles(num_tiles: int = 2_000_000) -> bytes:
    """Return a TIFF with a list of millions of tile offsets, eight megabytes."""
    tags = [*_tiff_size(64), (322, _TIFF_LONG, 1, 16), (323, _TIFF_LONG, 1, 16)]
    return _tiff(
        [*tags, (324, _TIFF_LONG, num_tiles, 8), (325, _TIFF_LONG, num_tiles, 8)], bytes(4 * num_tiles)
    )


def damaged_photo(seed: int) -> bytes:
    """Return a JPEG of noise with sixteen random bits flipped."""
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (240, 320, 3), dtype=np.uint8)).save(buffer, "JPEG")
    data = np.frombuffer(buffer.getvalue(), dtype=np.uint8).copy()
    data[rng.integers(2, len(data), 16)] ^= 1 << rng.integers(0, 8, 16, dtype=np.uint8)
    return data.tobytes()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _tiff_size(side: int) -> list[tuple[int, int, int, int]]:
    return [
        (256, _TIFF_LONG, 1, side),
        (257, _TIFF_LONG, 1, side),
        (258, _TIFF_SHORT, 1, 8),
        (259, _TIFF_SHORT, 1, 1),
        (262, _TIFF_SHORT, 1, 1),
        (277, _TIFF_SHORT, 1, 1),
    ]


def _tiff(tags: Iterable[tuple[int, int, int, int]], data: bytes) -> bytes:
    entries = [struct.pack("<HHII", *tag) for tag in sorted(tags)]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory
