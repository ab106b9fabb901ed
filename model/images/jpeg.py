"""The header of a JPEG file: size, memory, and the number of its scans, each of which costs a full pass."""

import re
import struct
from typing import Final

from model.errors import InvalidImageFileError

MAX_SCANS: Final = 100  # encoders write 10 or so
MAX_SEGMENTS: Final = 10_000
_NO_LENGTH: Final = frozenset({0x01, *range(0xD0, 0xD9)})
_SIZES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame
_PROGRESSIVE: Final = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_START_OF_SCAN: Final = 0xDA
_END: Final = 0xD9
_MARKER: Final = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # not the padding and restarts of a scan


def read_jpeg(data: bytes) -> tuple[int, int, int, int]:
    """Return width, height, and the bytes that the image and its coefficients take while it is decoded.

    Raises InvalidImageFileError for too many scans or segments, struct.error or LookupError for a damaged
    header.
    """
    header, kind, position = b"", 0, 2
    for _ in range(MAX_SEGMENTS):
        marker, position = _next_marker(data, position)
        if marker in _NO_LENGTH:
            continue
        (length,) = struct.unpack_from(">H", data, position)
        if marker == _START_OF_SCAN:
            break
        if marker in _SIZES:
            header, kind = data[position + 2 : position + length], marker
        position += length
    else:
        raise InvalidImageFileError(
            f"the JPEG has more than {MAX_SEGMENTS} segments in its header; save it again without metadata"
        )
    _check_scans(data, position)
    _, height, width, num_components = struct.unpack_from(">BHHB", header)
    is_buffered = kind in _PROGRESSIVE or data[position + 2] < num_components  # several scans
    num_samples = _samples_per_pixel(header[6:], num_components) * width * height if is_buffered else 0
    return width, height, width * height * (1 if num_components == 1 else 4), int(2 * num_samples)


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


def _check_scans(data: bytes, position: int) -> None:
    """Raise InvalidImageFileError for more scans than MAX_SCANS. position: behind the first marker of one."""
    if data.count(b"\xff\xda", position) < MAX_SCANS:  # an upper bound, and 50 times faster than the walk
        return
    num_scans, marker = 0, _START_OF_SCAN
    for _ in range(MAX_SEGMENTS):
        num_scans += marker == _START_OF_SCAN
        if num_scans > MAX_SCANS:
            break
        if marker not in _NO_LENGTH:
            position += struct.unpack_from(">H", data, position)[0]
        found = _MARKER.search(data, position)
        if found is None or data[found.end() - 1] == _END:
            return
        marker, position = data[found.end() - 1], found.end()
    raise InvalidImageFileError(f"the JPEG has more than {MAX_SCANS} scans; save it again as a baseline JPEG")
