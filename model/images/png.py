"""PNG files without the chunks that no pixel depends on, which may be many, large, or bombs."""

import struct
import zlib
from collections.abc import Iterator
from typing import Final

from model.errors import InvalidImageFileError

MAX_CHUNKS: Final = 100_000
_CRITICAL: Final = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
_ANCILLARY: Final = frozenset({b"tRNS", b"eXIf"})  # transparency and orientation
_LEVEL_TYPES: Final = (0, 2)  # grey and RGB, whose transparent colour is of levels
_TEXTS: Final = frozenset({b"tEXt", b"zTXt", b"iTXt"})
# Their values may hold the orientation.
_KEYWORDS: Final = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_MAX_TEXT_BYTES: Final = 2**20  # unpacked; Pillow refuses the image beyond it


def without_metadata(data: bytes) -> bytes:
    """Return the same picture without metadata, damaged ancillary chunks, and further frames of an animation.

    Raises InvalidImageFileError for too many chunks, and for pixels with a wrong checksum, which Pillow does
    not look at. Any other damage is kept, for the decoder to refuse.
    """
    view = memoryview(data)
    depth, color_type = data[24], data[25]
    has_levels = color_type in _LEVEL_TYPES
    for kind, start, end in _chunks(data):
        if kind == b"IDAT" and not _is_whole(view[start + 4 : end]):
            raise InvalidImageFileError(
                "the PNG's pixels are damaged or truncated (wrong checksum); send the file whole"
            )
    kept = [
        _without_spare_bits(view[start:end], depth) if has_levels and kind == b"tRNS" else view[start:end]
        for kind, start, end in _chunks(data)
        if _is_read(kind, view[start + 8 : end - 4])
        and (kind in _CRITICAL or _is_whole(view[start + 4 : end]))
    ]
    return b"".join([view[:8], *kept])


def has_transparency(data: bytes) -> bool:
    """Return whether there is a chunk of transparency. Raises InvalidImageFileError for too many chunks."""
    return any(kind == b"tRNS" for kind, _, _ in _chunks(data))


def damaged_chunks(data: bytes) -> list[str]:
    """Return the kinds of the chunks of transparency and orientation that have a wrong checksum."""
    view = memoryview(data)
    kinds = [
        kind.decode()
        for kind, start, end in _chunks(data)
        if kind in _ANCILLARY and not _is_whole(view[start + 4 : end])
    ]
    return list(dict.fromkeys(kinds))


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of each chunk, its length and checksum included."""
    start = 8
    for _ in range(MAX_CHUNKS):
        if start + 8 > len(data):
            return
        (length,) = struct.unpack_from(">I", data, start)
        kind, end = data[start + 4 : start + 8], start + length + 12
        yield kind, start, min(end, len(data))
        if kind == b"IEND":
            return
        start = end
    raise InvalidImageFileError(f"the PNG has more than {MAX_CHUNKS} chunks; save it again without metadata")


def _is_read(kind: bytes, content: memoryview) -> bool:
    """Return whether pixels may depend on a chunk."""
    if kind not in _TEXTS:
        return kind in _CRITICAL or kind in _ANCILLARY
    text = bytes(content[: _MAX_TEXT_BYTES + 1])
    if len(text) > _MAX_TEXT_BYTES or not text.startswith(_KEYWORDS):
        return False
    compressed = text.find(b"x", text.index(b"\0"))  # where a zlib stream begins, if there is one
    return compressed < 0 or _is_small(text[compressed:])


def _without_spare_bits(chunk: memoryview, depth: int) -> bytes | memoryview:
    """Return a chunk of transparency in which only the bits of a sample are set (PNG, 11.3.2.1)."""
    levels = chunk[8:-4]
    if len(levels) not in (2, 6):  # damaged
        return chunk
    masked = b"".join((level & 2**depth - 1).to_bytes(2) for (level,) in struct.iter_unpack(">H", levels))
    content = b"tRNS" + masked
    return b"".join([chunk[:4], content, zlib.crc32(content).to_bytes(4)])


def _is_whole(chunk: memoryview) -> bool:
    """Return whether a checksum fits. chunk: kind, content and checksum."""
    return zlib.crc32(chunk[:-4]) == int.from_bytes(chunk[-4:])


def _is_small(compressed: bytes) -> bool:
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(compressed, _MAX_TEXT_BYTES)
    except zlib.error:  # no zlib stream after all
        return True
    return not unpacker.unconsumed_tail
