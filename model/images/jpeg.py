"""The header of a JPEG file: size, memory, and the number of its scans, each of which costs a full pass."""

import re
import struct
from collections.abc import Iterator
from typing import Final

from model.errors import InvalidImageFileError

MAX_SCANS: Final = 100  # encoders write 10 or so
MAX_SEGMENTS: Final = 10_000
_END: Final = b"\xff\xd9"
_FIRST_RESTART: Final = 0xD0  # of eight markers in turns
_COMPONENTS: Final = (1, 3, 4)
_NO_LENGTH: Final = frozenset({0x01, *range(0xD0, 0xD9)})
_SIZES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame
_PROGRESSIVE: Final = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_START_OF_SCAN: Final = 0xDA
_MARKER: Final = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # not the padding and restarts of a scan
_NUM_COEFFICIENTS: Final = 64  # of a block
_MAX_DATA_ZEROS: Final = (
    3  # bytes at the end of a scan; more are what a disk or a download holds behind a cut
)


def read_jpeg(data: bytes) -> tuple[int, int, int, int]:
    """Return width, height, and the bytes that the image and its coefficients take while it is decoded.

    Raises InvalidImageFileError for too many scans or segments, struct.error or LookupError for a damaged
    header.
    """
    header, kind, position = _read_segments(data)
    _check_scans(data, position)
    depth, height, width, num_components = struct.unpack_from(">BHHB", header)
    if depth != 8:
        raise InvalidImageFileError(
            f"the JPEG has {depth} bits per sample, and 8 are read; convert it to 8 bits"
        )
    if num_components not in _COMPONENTS:
        raise InvalidImageFileError(
            f"the JPEG has {num_components} components, and 1, 3 or 4 are read; convert it to RGB"
        )
    is_buffered = kind in _PROGRESSIVE or data[position + 2] < num_components  # several scans
    num_samples = _samples_per_pixel(header[6:], num_components) * width * height if is_buffered else 0
    return width, height, width * height * (1 if num_components == 1 else 4), int(2 * num_samples)


def lacks_end(data: bytes) -> bool:
    """Return whether no end marker follows the pixels. A damaged header lacks more than that: False."""
    if data.endswith(_END):
        return False
    try:
        _, _, first_scan = _read_segments(data)
    except (struct.error, LookupError, InvalidImageFileError):
        return False
    return data.find(_END, first_scan) < 0


def without_fill(data: bytes) -> bytes:
    """Return a cut file without half a marker, and without the zeros or ones in place of the missing rest."""
    start = data.rstrip(b"\0")
    if len(data) - len(start) > _MAX_DATA_ZEROS:
        data = start + b"\0" if start.endswith(b"\xff") else start  # a 255 of a scan is followed by a zero
    return data.rstrip(b"\xff")


def has_all_scans(data: bytes) -> bool:
    """Return whether a cut file has the scans of all coefficients in full precision; the last may be cut.

    Of a progressive file each component needs all 64, of others one scan. Raises struct.error, LookupError or
    InvalidImageFileError for a damaged header.
    """
    header, kind, position = _read_segments(data)
    missing = {component: set(range(_NUM_COEFFICIENTS)) for component in header[6::3]}
    for start in _scans(data, position):
        end = start + 3 + 2 * data[start + 2]
        first, last, precision = struct.unpack_from("3B", data, end)
        if kind not in _PROGRESSIVE:
            first, last, precision = 0, _NUM_COEFFICIENTS - 1, 0
        if precision & 15 == 0:  # no bits are left for later scans
            for component in data[start + 3 : end : 2]:
                missing.get(component, set[int]()).difference_update(range(first, last + 1))
    return not any(missing.values())


def ends_for(data: bytes) -> tuple[bytes, bytes]:
    """Return two ends for a file that is cut off, whose bits differ from the first one on.

    Where pixels are missing, they are decoded from these bits, or from those behind the next restart marker,
    and so into different ones.
    """
    last = max(range(8), key=lambda number: data.rfind(bytes([0xFF, _FIRST_RESTART + number])))
    restarts = [_FIRST_RESTART + (last + turn) % 8 for turn in range(1, 9)]
    first, second = (
        b"".join(
            bytes([bits, *((factor * index + 31 * index**2) % 255 for index in range(1024)), 0xFF, marker])
            for marker in (*restarts, _END[1])
        )
        for bits, factor in ((0x2A, 73), (0xD5, 179))
    )
    return first, second


def _read_segments(data: bytes) -> tuple[bytes, int, int]:
    """Return the start of frame, its marker, and the position behind the first marker of a scan."""
    header, kind, position = b"", 0, 2
    for _ in range(MAX_SEGMENTS):
        marker, position = _next_marker(data, position)
        if marker in _NO_LENGTH:
            continue
        (length,) = struct.unpack_from(">H", data, position)
        if marker == _START_OF_SCAN:
            return header, kind, position
        if marker in _SIZES:
            header, kind = data[position + 2 : position + length], marker
        position += length
    raise _too_many_segments()


def _next_marker(data: bytes, position: int) -> tuple[int, int]:
    """Return the next marker, and the position behind it."""
    found = _MARKER.search(data, position)
    if found is None:
        raise LookupError("no marker follows")
    return data[found.end() - 1], found.end()


def _samples_per_pixel(components: bytes, num_components: int) -> float:
    """Return how many coefficients a decoder buffers for each pixel, by the subsampling of the components."""
    sampling = [components[3 * index + 1] for index in range(num_components)]
    most = max(each >> 4 for each in sampling) * max(each & 15 for each in sampling)
    return sum((each >> 4) * (each & 15) for each in sampling) / max(1, most)


def _scans(data: bytes, position: int) -> Iterator[int]:
    """Yield the position behind the marker of each scan, until the end. position: that of the first.

    Raises InvalidImageFileError for too many segments. Where a file is cut inside one, that is not yielded.
    """
    marker = _START_OF_SCAN
    for _ in range(MAX_SEGMENTS):
        if marker not in _NO_LENGTH:
            start = position
            position += int.from_bytes(data[start : start + 2])
            if position > len(data):
                return
            if marker == _START_OF_SCAN:
                yield start
        found = _MARKER.search(data, position)
        if found is None or found[0] == _END:
            return
        marker, position = data[found.end() - 1], found.end()
    raise _too_many_segments()


def _check_scans(data: bytes, position: int) -> None:
    """Raise InvalidImageFileError for more scans than MAX_SCANS. position: behind the first marker of one."""
    if data.count(b"\xff\xda", position) < MAX_SCANS:  # an upper bound, and 50 times faster than the walk
        return
    for num_scans, _ in enumerate(_scans(data, position), 1):
        if num_scans > MAX_SCANS:
            raise InvalidImageFileError(
                f"the JPEG has more than {MAX_SCANS} scans; save it again as a baseline JPEG"
            )


def _too_many_segments() -> InvalidImageFileError:
    return InvalidImageFileError(
        f"the JPEG has more than {MAX_SEGMENTS} segments; save it again without metadata"
    )
