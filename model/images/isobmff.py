"""The header of AVIF and HEIC files, which are boxes inside boxes: size and memory of the primary image."""

import struct
from collections.abc import Iterator
from typing import Final

from model.errors import InvalidImageFileError

MAX_BOXES: Final = 10_000  # side by side, and parts of items; a grid of tiles has a few hundred items
_BRANDS: Final = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "HEIC"),
}
_GENERIC_BRANDS: Final = frozenset({b"mif1", b"msf1", b"mif2", b"miaf", *_BRANDS})
_FULL_BOX: Final = 4  # bytes of version and flags
_HEVC_SAMPLES: Final = (1.0, 1.5, 2.0, 3.0)  # for each pixel, by the chroma format
Box = tuple[bytes, int, int]  # kind, start and end of its content


def sniff_isobmff(data: bytes) -> str | None:
    """Return AVIF or HEIC by the brands that the first box names, or None."""
    if data[4:8] != b"ftyp" or data[8:12] not in _GENERIC_BRANDS:
        return None
    end = min(int.from_bytes(data[:4]), len(data), 256)
    brands = [data[8:12], *(data[place : place + 4] for place in range(16, end - 3, 4))]
    return next((_BRANDS[brand] for brand in brands if brand in _BRANDS), None)


def read_isobmff(data: bytes) -> tuple[int, int, int, int]:
    """Return width, height, and the bytes of the image and of what its decoder holds beside it.

    Raises InvalidImageFileError for too many boxes, for a file that is cut off, and for a film without a
    still picture; struct.error or LookupError for damage.
    """
    meta = _meta(data)
    _check_parts(data, meta[b"iloc"][0])
    containers = by_kind(data, *meta[b"iprp"])
    properties = list(boxes(data, *containers[b"ipco"]))
    numbers = _property_numbers(data, _primary_item(data, meta[b"pitm"][0]), containers[b"ipma"][0])
    own = {kind: place for kind, place, _ in (properties[number - 1] for number in numbers if number)}
    width, height = struct.unpack_from(">2I", data, own[b"ispe"] + _FULL_BOX)
    is_grid = b"iinf" in meta and data.find(b"grid", *meta[b"iinf"]) >= 0
    frame_bytes = max(_frame_bytes(data, kind, place, is_grid=is_grid) for kind, place, _ in properties)
    # Beside the frame: a plane of transparency, which may be deep, and the pixels as RGBA.
    return width, height, 4 * width * height, int((frame_bytes + 6) * width * height)


def without_metadata(data: bytes) -> bytes:
    """Return the same picture with its EXIF and XMP renamed, for the orientation in them does not count.

    Raises as `read_isobmff`.
    """
    start, end = _meta(data).get(b"iinf", (0, 0))
    kinds = data[start:end].replace(b"Exif", b"free").replace(b"mime", b"free")
    return b"".join([data[:start], kinds, data[end:]])


def boxes(data: bytes, place: int, end: int) -> Iterator[Box]:
    """Yield the boxes between two places.

    Raises InvalidImageFileError for too many, struct.error or LookupError for damage.
    """
    for _ in range(MAX_BOXES):
        if place + 8 > end:
            return
        num_bytes, kind = struct.unpack_from(">I4s", data, place)
        start = place + 8
        if num_bytes == 1:
            (num_bytes,) = struct.unpack_from(">Q", data, start)
            start += 8
        last = end if num_bytes == 0 else place + num_bytes
        if not start <= last <= end:
            raise LookupError("a box ends beyond the one it is in")
        yield kind, start, last
        place = last
    raise _too_many_boxes()


def _too_many_boxes() -> InvalidImageFileError:
    return InvalidImageFileError(
        f"the file has more than {MAX_BOXES} boxes side by side, or parts; save it again without metadata"
    )


def _meta(data: bytes) -> dict[bytes, tuple[int, int]]:
    outer = by_kind(data, 0, len(data), until=b"meta")
    if b"moov" in outer and b"meta" not in outer:
        raise InvalidImageFileError("the file is a film without a still picture; send one of its frames")
    start, end = outer[b"meta"]
    return by_kind(data, start + _FULL_BOX, end)


def by_kind(data: bytes, place: int, end: int, until: bytes = b"") -> dict[bytes, tuple[int, int]]:
    """Return start and end of the first box of each kind; those behind a box `until` are not looked at."""
    found: dict[bytes, tuple[int, int]] = {}
    for kind, start, last in boxes(data, place, end):
        found.setdefault(kind, (start, last))
        if kind == until:
            break
    return found


def _check_parts(data: bytes, place: int) -> None:
    """Raise InvalidImageFileError where an item ends beyond the file: libheif leaves missing tiles black."""
    version, sizes, more_sizes = data[place], data[place + 4], data[place + 5]
    offset_bytes, length_bytes, base_bytes = sizes >> 4, sizes & 15, more_sizes >> 4
    index_bytes = more_sizes & 15 if version else 0
    number = ">I" if version == 2 else ">H"
    (num_items,) = struct.unpack_from(number, data, place + 6)
    place += 6 + struct.calcsize(number)
    num_parts = 0
    for _ in range(num_items):
        place += struct.calcsize(number)
        is_elsewhere = version > 0 and data[place + 1] & 15 > 0  # not at an offset in the file
        place += 4 if version else 2
        base = int.from_bytes(data[place : place + base_bytes])
        place += base_bytes
        (num_own,) = struct.unpack_from(">H", data, place)
        place, num_parts = place + 2, num_parts + max(1, num_own)
        if num_parts > MAX_BOXES:
            raise _too_many_boxes()
        for _ in range(num_own):
            place += index_bytes
            offset = int.from_bytes(data[place : place + offset_bytes])
            place += offset_bytes
            length = int.from_bytes(data[place : place + length_bytes])
            place += length_bytes
            if not is_elsewhere and base + offset + length > len(data):
                raise InvalidImageFileError(
                    f"the {sniff_isobmff(data)} ends before its last pixels; send it whole"
                )


def _primary_item(data: bytes, place: int) -> int:
    (number,) = struct.unpack_from(">I" if data[place] else ">H", data, place + _FULL_BOX)
    return int(number)


def _property_numbers(data: bytes, item: int, place: int) -> list[int]:
    """Return the numbers of an item's properties, from 1."""
    version, flags = data[place], data[place + 3]
    (num_items,) = struct.unpack_from(">I", data, place + _FULL_BOX)
    place += _FULL_BOX + 4
    for _ in range(min(num_items, MAX_BOXES)):
        (number,) = struct.unpack_from(">I" if version else ">H", data, place)
        place += 4 if version else 2
        count = data[place]
        letter, mask = ("H", 0x7FFF) if flags & 1 else ("B", 0x7F)
        if number == item:
            return [each & mask for each in struct.unpack_from(f">{count}{letter}", data, place + 1)]
        place += 1 + count * struct.calcsize(letter)
    raise LookupError("the primary image has no properties")


def _frame_bytes(data: bytes, kind: bytes, place: int, *, is_grid: bool) -> float:
    """Return what a decoder holds for each pixel of a frame, by a property if that is its configuration.

    The tiles of a grid are put together in a second one. HEVC of more than 8 bits is converted in two steps.
    """
    if kind == b"av1C":
        flags = data[place + 2]
        is_deep, is_grey, is_narrow, is_low = (flags >> shift & 1 for shift in (6, 4, 3, 2))
        samples, num_frames = (1.0 if is_grey else 3 - is_narrow - is_low / 2), 1 + is_grid
    elif kind == b"hvcC":
        samples, is_deep = _HEVC_SAMPLES[data[place + 16] & 3], int(data[place + 17] & 7 > 0)
        num_frames = 1 + (is_grid or is_deep)
    else:
        return 0
    return samples * (1 + is_deep) * num_frames
