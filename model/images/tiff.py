"""The header of a TIFF file: size, memory, the number of its tiles or strips, and what its samples mean."""

import struct
from dataclasses import dataclass
from typing import Final

from model.errors import InvalidImageFileError

MAX_TILES: Final = 65_536  # or strips
_MAX_TAGS: Final = 65_535  # as many as TIFF has; BigTIFF counts them in 64 bits
_MAX_VALUES: Final = 16  # of one tag that are read
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_STRIPS, _ORIENTATION, _SAMPLES, _ROWS_PER_STRIP, _STRIP_BYTES, _PLANES = 273, 274, 277, 278, 279, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 322, 323, 324, 325
_EXTRA_SAMPLES, _SAMPLE_FORMAT = 338, 339
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _CMYK, _YCBCR, _CIELAB = 0, 1, 2, 5, 6, 8
_IN_PLANES: Final = 2
_READ_IN_PLANES: Final = {  # number of samples, and of those beside the colour
    (_RGB, 3, 0),
    (_RGB, 4, 1),
    (_CMYK, 4, 0),
    (_CMYK, 5, 1),
    (_YCBCR, 3, 0),
}
_UNSIGNED: Final = 1
_DEEPEST: Final = 16
_FORMATS: Final = {1: "B", 3: "H", 4: "I", 16: "Q"}  # of integers, by the type of a tag
_PHOTOMETRICS: Final = {
    _WHITE_IS_ZERO: "grey with white as zero",
    _BLACK_IS_ZERO: "grey",
    _RGB: "RGB",
    3: "palette colours",
    4: "a transparency mask",
    _CMYK: "CMYK",
    _YCBCR: "YCbCr",
    _CIELAB: "CIELab",
    9: "ICCLab",
    10: "ITULab",
    32803: "raw camera data",
    32844: "LogL",
    32845: "LogLuv",
    34892: "raw camera data",
}
_EXTRAS: Final = {0: "an unspecified sample", 1: "premultiplied alpha", 2: "alpha"}
_SAMPLE_FORMATS: Final = {
    _UNSIGNED: "unsigned",
    2: "signed",
    3: "floating point",
    4: "of undefined type",
    5: "complex",
    6: "complex floating point",
}
# By libtiff as Pillow has it: none, CCITT, LZW, JPEG, deflate, PackBits and others.
_COMPRESSIONS: Final = frozenset(
    {1, 2, 3, 4, 5, 6, 7, 8, 32771, 32773, 32809, 32946, 34676, 34677, 34925, 50000, 50001}
)


@dataclass(frozen=True, slots=True)
class Tag:
    """count: how many values there are; values: the first ones."""

    count: int
    values: tuple[int, ...]

    @property
    def value(self) -> int:
        """Return the first value."""
        return self.values[0]


def read_tiff(data: bytes) -> tuple[int, int, int, int, int, bool]:
    """Return width, height, bytes of the image and of buffers, bits per sample, and whether 0 means white.

    Raises InvalidImageFileError for too many tiles or strips, and for samples that are not read; struct.error
    or LookupError for damage.
    """
    if data.startswith(b"MM\0+"):
        raise InvalidImageFileError(
            "the TIFF is a BigTIFF in big-endian order, which is not read; save it as a TIFF"
        )
    tags = _read_tags(data)
    for tag in (_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES):
        if tag in tags and tags[tag].count > MAX_TILES:
            raise InvalidImageFileError(
                f"the TIFF has {tags[tag].count} tiles or strips, the limit is {MAX_TILES}; "
                "save it with larger ones"
            )
    width, height = tags[_WIDTH].value, tags[_HEIGHT].value
    _check_samples(tags)
    depth, num_samples = max(_values(tags, _BITS, 1)), _values(tags, _SAMPLES, 1)[0]
    pixel_bytes = (depth + 7) // 8 if num_samples == 1 else 4  # in Pillow
    if _values(tags, _ORIENTATION, 1)[0] != 1:
        pixel_bytes *= 2  # Pillow rotates a copy
    image_bytes, buffer_bytes = width * height * pixel_bytes, _buffer_bytes(tags, depth * num_samples)
    is_white_zero = _values(tags, _PHOTOMETRIC, _WHITE_IS_ZERO)[0] == _WHITE_IS_ZERO
    return width, height, image_bytes, buffer_bytes, depth, is_white_zero


def unread_tiff(data: bytes) -> InvalidImageFileError:
    """Return the refusal of a file whose header is whole, but whose pixels are of a kind that is not read."""
    return _unread(_read_tags(data))


def _check_samples(tags: dict[int, Tag]) -> None:
    """Raise InvalidImageFileError for what Pillow would read, but not as what it means."""
    formats, photometric = set(_values(tags, _SAMPLE_FORMAT, _UNSIGNED)), _values(tags, _PHOTOMETRIC, 0)[0]
    num_samples, num_extra = _values(tags, _SAMPLES, 1)[0], len(_values(tags, _EXTRA_SAMPLES))
    is_unread_in_planes = (
        _values(tags, _PLANES, 1)[0] == _IN_PLANES
        and num_samples > 1
        and (photometric, num_samples, num_extra) not in _READ_IN_PLANES
    )
    is_deep = max(_values(tags, _BITS, 1)) > _DEEPEST
    if formats != {_UNSIGNED} or is_deep or photometric == _CIELAB or is_unread_in_planes:
        raise _unread(tags)
    compression = _values(tags, _COMPRESSION, 1)[0]
    if compression not in _COMPRESSIONS:
        raise InvalidImageFileError(
            f"the TIFF is compressed by method {compression}, which is not read; save it with LZW or deflate"
        )


def _unread(tags: dict[int, Tag]) -> InvalidImageFileError:
    photometric = _values(tags, _PHOTOMETRIC, _WHITE_IS_ZERO)[0]
    bits, num_samples = _values(tags, _BITS, 1), _values(tags, _SAMPLES, 1)[0]
    content = _PHOTOMETRICS.get(photometric, f"photometric interpretation {photometric}")
    extras = [_EXTRAS.get(kind, str(kind)) for kind in _values(tags, _EXTRA_SAMPLES)]
    formats = [_SAMPLE_FORMATS.get(each, str(each)) for each in dict.fromkeys(_values(tags, _SAMPLE_FORMAT))]
    parts = [
        " with ".join([content, *extras]),
        f"{num_samples} sample{'s' * (num_samples > 1)}",
        f"{' and '.join(map(str, dict.fromkeys(bits)))} bits per sample",
        *formats,
        *(["each sample in a plane of its own"] if _values(tags, _PLANES, 1)[0] == _IN_PLANES else []),
    ]
    is_of_any_range = max(bits) > _DEEPEST or not {"unsigned"}.issuperset(formats)
    reason = "nothing says which values are black and white" if is_of_any_range else "that is not read"
    return InvalidImageFileError(
        f"the TIFF has {', '.join(parts)}, and {reason}; convert it to 8 bits, RGB or grey"
    )


def _values(tags: dict[int, Tag], tag: int, default: int | None = None) -> tuple[int, ...]:
    if tag in tags:
        return tags[tag].values
    return () if default is None else (default,)


def _read_tags(data: bytes) -> dict[int, Tag]:
    """Read the integer tags of the first directory; of equal ones the first counts, as in Pillow."""
    order = "<" if data[:2] == b"II" else ">"
    (version,) = struct.unpack_from(order + "H", data, 2)
    is_big = version == 43  # BigTIFF: 64 bits for places and counts
    word, count_format, entry = ("Q", "Q", "HHQ") if is_big else ("I", "H", "HHI")
    word_bytes, entry_bytes = struct.calcsize(word), struct.calcsize("<" + entry + word)
    (start,) = struct.unpack_from(order + word, data, word_bytes)
    (num_tags,) = struct.unpack_from(order + count_format, data, start)
    start += struct.calcsize(count_format)
    entries = data[start : start + entry_bytes * min(num_tags, _MAX_TAGS)]
    tags: dict[int, Tag] = {}
    for position in range(0, len(entries) - entry_bytes + 1, entry_bytes):
        tag, kind, count = struct.unpack_from(order + entry, entries, position)
        letter = _FORMATS.get(kind)
        if letter is None or tag in tags or count == 0:
            continue
        value_at = position + entry_bytes - word_bytes
        is_inside = count * struct.calcsize(letter) <= word_bytes
        (offset,) = struct.unpack_from(order + word, entries, value_at)
        source, place = (entries, value_at) if is_inside else (data, offset)
        num_values = min(count, _MAX_VALUES, max(0, len(source) - place) // struct.calcsize(letter))
        if num_values:
            tags[tag] = Tag(count, struct.unpack_from(f"{order}{num_values}{letter}", source, place))
    return tags


def _buffer_bytes(tags: dict[int, Tag], pixel_bits: int) -> int:
    """Compute the size of libtiff's buffers for one tile or strip, beside the image."""
    width, height = tags[_WIDTH].value, tags[_HEIGHT].value
    if _TILE_WIDTH in tags and _TILE_HEIGHT in tags:
        num_pixels = tags[_TILE_WIDTH].value * tags[_TILE_HEIGHT].value
    else:
        num_pixels = width * min(height, tags.get(_ROWS_PER_STRIP, Tag(1, (height,))).value)
    if _values(tags, _PHOTOMETRIC, 0)[0] == _YCBCR:
        pixel_bits += 32  # converted by libtiff, a strip at a time
    return num_pixels * pixel_bits // 8
