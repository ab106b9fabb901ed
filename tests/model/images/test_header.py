"""Headers: every limit at its value and one past it, without a decoder, and before memory is allocated."""

import struct
import time
import tracemalloc
from collections.abc import Callable

import pytest

from model.errors import InvalidImageFileError, UnknownImageFormatError
from model.images.header import MAX_SIDE_PX, check_size, memory_of, read_header
from model.images.jpeg import MAX_SCANS, MAX_SEGMENTS
from model.images.tiff import MAX_TILES
from tests.image_files import encode, jpeg_of_scans, noise, one_of_each_type, png_of_zeros, tiff

FILES = one_of_each_type(70, 50)
MAX_SECONDS = 1.0  # of reading any header
MAX_ALLOCATED_BYTES = 8 * 2**20


def long(value: int) -> bytes:
    return struct.pack("<I", value)


@pytest.mark.parametrize("name", FILES)
def test_the_size_is_that_of_the_picture(name: str) -> None:
    header = read_header(FILES[name])
    assert (header.width, header.height) == (70, 50)
    assert header.image_bytes >= 70 * 50


@pytest.mark.parametrize("name", FILES)
def test_a_header_that_is_cut_off_is_damaged_not_a_crash(name: str) -> None:
    for end in range(1, 400):
        try:
            read_header(FILES[name][:end])
        except (InvalidImageFileError, UnknownImageFormatError):
            continue


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (0, 5, "0 x 5 px and has no pixels"),
        (1, 1_000_001, r"1 Mpx, the limit is 1 Mpx; downscale"),
        (1, MAX_SIDE_PX + 1, "1 x 65536 px, the limit of a side is 65535 px; cut it"),
        (MAX_SIDE_PX + 1, 1, "65536 x 1 px, the limit of a side is 65535 px"),
    ],
)
def test_a_size_one_past_a_limit_is_refused(width: int, height: int, message: str) -> None:
    with pytest.raises(InvalidImageFileError, match=message):
        check_size(width, height, 1_000_000)


def test_a_size_at_the_limits_is_taken() -> None:
    check_size(1, MAX_SIDE_PX, 1_000_000)
    check_size(MAX_SIDE_PX, 1, 1_000_000)
    check_size(1000, 1000, 1_000_000)


def test_scans_of_a_jpeg_are_limited() -> None:
    assert read_header(jpeg_of_scans(MAX_SCANS)).width == 64
    with pytest.raises(InvalidImageFileError, match="more than 100 scans; save it again as a baseline JPEG"):
        read_header(jpeg_of_scans(MAX_SCANS + 1))


def test_markers_of_scans_inside_of_metadata_are_no_scans() -> None:
    comment = b"\xff\xfe" + struct.pack(">H", 2 + 4000) + b"\xff\xda" * 2000
    assert read_header(b"\xff\xd8" + comment + FILES["jpeg"][2:] + b"\xff\xda" * 2000).width == 70


def segments(count: int) -> bytes:
    return b"\xff\xd8" + b"\xff\xe5\0\2" * count + FILES["jpeg"][2:]


def test_segments_of_a_jpeg_are_limited() -> None:
    num_own = FILES["jpeg"].index(b"\xff\xda")  # fewer segments than bytes
    assert read_header(segments(MAX_SEGMENTS - num_own)).width == 70
    with pytest.raises(InvalidImageFileError, match="more than 10000 segments"):
        read_header(segments(MAX_SEGMENTS))


@pytest.mark.parametrize("tag", [273, 279, 324, 325])
def test_tiles_and_strips_of_a_tiff_are_limited(tag: int) -> None:
    content = bytes(4 * (MAX_TILES + 1))
    at_the_limit = tiff(content, 64, 64, tags=[(tag, 4, MAX_TILES, long(8))])
    assert read_header(at_the_limit).width == 64
    with pytest.raises(InvalidImageFileError, match="65537 tiles or strips, the limit is 65536"):
        read_header(tiff(content, 64, 64, tags=[(tag, 4, MAX_TILES + 1, long(8))]))


def test_a_tile_larger_than_the_image_is_counted() -> None:
    tags = [(259, 3, 1, b"\5\0\0\0"), (322, 4, 1, long(45_008)), (323, 4, 1, long(45_008))]
    header = read_header(tiff(bytes(64), 64, 64, tags=tags))
    assert memory_of(header, 224, 64) > 45_008**2


def test_memory_grows_with_what_a_decoder_buffers() -> None:
    image = noise(600, 600)
    baseline = memory_of(read_header(encode(image, "JPEG")), 224, 0)
    progressive = memory_of(read_header(encode(image, "JPEG", progressive=True, subsampling=0)), 224, 0)
    assert progressive - baseline == 600 * 600 * 6 - 600 * 224 * 4
    tall = memory_of(read_header(png_of_zeros(100, 60_000)), 224, 0)
    assert tall >= 100 * 60_000 * 5


HOSTILE: dict[str, Callable[[], bytes]] = {
    "segments": lambda: b"\xff\xd8" + b"\xff\xe5\0\2" * 5_000_000,
    "padding": lambda: b"\xff\xd8\xff\xe0" + b"\xff" * 20_000_000,
    "padding that ends": lambda: b"\xff\xd8" + b"\xff" * 20_000_000 + b"\0",
    "restarts": lambda: FILES["jpeg"][:-2] + b"\xff\xd0" * 10_000_000,
    "markers between scans": lambda: jpeg_of_scans(MAX_SCANS)[:-2] + b"\xff\x01" * 10_000_000,
    "scans": lambda: jpeg_of_scans(20_000, (16, 16)),
    "tags": lambda: b"II*\0\x08\0\0\0\xff\xff" + b"\x00\x01\x04\0\x01\0\0\0\0\0\0\0" * 65_535,
    "tile offsets": lambda: tiff(bytes(16_000_000), 64, 64, tags=[(324, 4, 4_000_000, long(8))]),
}


@pytest.mark.serial
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_costs_little_time_and_memory(name: str) -> None:
    data = HOSTILE[name]()
    tracemalloc.start()
    started = time.monotonic()
    try:
        read_header(data)
    except InvalidImageFileError:
        pass
    finally:
        seconds, (_, peak_bytes) = time.monotonic() - started, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert seconds < MAX_SECONDS
    assert peak_bytes < MAX_ALLOCATED_BYTES
