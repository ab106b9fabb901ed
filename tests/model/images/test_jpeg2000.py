"""JPEG 2000: colour spaces, depths and tiles of files in boxes and of codestreams alone, by hand."""

import re
import struct
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from PIL import Image

from model.errors import InvalidImageFileError
from model.images.decoding import decode_image
from model.images.header import memory_of, read_header
from model.images.jpeg2000 import MAX_TILES
from tests.image_files import encode, noise
from tests.isobmff_files import box

Color = tuple[int, ...]
DEPTH_AT = 42  # of the first component in a codestream
RGB, GREY, SYCC, CMYK = 16, 17, 18, 12  # as boxes number the colour spaces
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def codestream(left: Sequence[int], right: Sequence[int], dtype: type = np.uint8) -> bytes:
    """Encode two halves of one colour each, without a colour transform."""
    samples: np.ndarray = np.empty((16, 16, len(left)), dtype)
    samples[:, :8], samples[:, 8:] = left, right
    image = Image.fromarray(samples if len(left) > 1 else samples[..., 0], "LA" if len(left) == 2 else None)
    return encode(image, "JPEG2000", no_jp2=True, mct=0)


def jp2(data: bytes, color_space: int, *, palette: bytes = b"", size: tuple[int, int] = (16, 16)) -> bytes:
    """Put a codestream of 8 bits into boxes."""
    num_components = struct.unpack_from(">H", data, 40)[0]
    header = box(b"ihdr", struct.pack(">2IH4B", size[1], size[0], num_components, 7, 7, 0, 0))
    color = box(b"colr", struct.pack(">3BI", 1, 0, 0, color_space))
    start = box(b"jP  ", b"\r\n\x87\n") + box(b"ftyp", b"jp2 \0\0\0\0jp2 ")
    return start + box(b"jp2h", header + color + palette) + box(b"jp2c", data)


def with_depth(data: bytes, depth: int, *, is_signed: bool = False) -> bytes:
    """Change the depth that the first component claims."""
    return data[:DEPTH_AT] + bytes([depth - 1 | is_signed << 7]) + data[DEPTH_AT + 1 :]


def colors(data: bytes) -> tuple[Color, Color]:
    pixels = np.asarray(decode_image(data, 16))
    left, right = pixels[3, 3].tolist(), pixels[3, 12].tolist()
    return tuple(left), tuple(right)


PALETTE = box(b"pclr", struct.pack(">H4B", 2, 3, 7, 7, 7) + bytes([1, 2, 3, 255, 128, 0])) + box(
    b"cmap", b"".join(struct.pack(">H2B", 0, 1, column) for column in range(3))
)
FILES: dict[str, tuple[Callable[[], bytes], Color, Color]] = {
    "grey": (lambda: codestream([7], [254]), (7, 7, 7), (254, 254, 254)),
    "grey in boxes": (lambda: jp2(codestream([7], [254]), GREY), (7, 7, 7), (254, 254, 254)),
    "signed grey": (lambda: with_depth(codestream([0], [255]), 8, is_signed=True), BLACK, WHITE),
    "grey with alpha": (lambda: jp2(codestream([55, 51], [9, 255]), GREY), (215, 215, 215), (9, 9, 9)),
    "grey of 16 bits": (lambda: codestream([0x12FF], [65_535], np.uint16), (18, 18, 18), WHITE),
    "RGB": (lambda: codestream([1, 2, 3], [255, 128, 0]), (1, 2, 3), (255, 128, 0)),
    "RGB in boxes": (lambda: jp2(codestream([1, 2, 3], [9, 8, 7]), RGB), (1, 2, 3), (9, 8, 7)),
    "RGB with alpha": (
        lambda: jp2(codestream([55, 5, 255, 51], [9, 8, 7, 255]), RGB),
        (215, 205, 255),
        (9, 8, 7),
    ),
    "YCbCr": (
        lambda: jp2(codestream([100, 128, 128], [127, 63, 255]), SYCC),
        (100, 100, 100),
        (255, 58, 11),
    ),
    "CMYK": (lambda: jp2(codestream([255, 0, 55, 0], [0, 0, 0, 255]), CMYK), (0, 255, 200), BLACK),
    "palette": (
        lambda: jp2(codestream([0], [1]), RGB, palette=PALETTE),
        (1, 2, 3),
        (255, 128, 0),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_the_values_of_its_samples(name: str) -> None:
    build_file, *expected = FILES[name]
    assert colors(build_file()) == tuple(expected)


@pytest.mark.parametrize("depth", [9, 10, 12, 15])
def test_grey_of_any_depth_is_scaled_by_its_own_range(depth: int) -> None:
    levels = np.tile(np.arange(256)[:, None], (1, 256)) << depth - 8
    # An encoder subtracts half of the range, that of 16 bits here; a decoder adds half of the depth's.
    samples = levels + 2**15 - 2 ** (depth - 1)
    data = encode(Image.fromarray(samples.astype(np.uint16)), "JPEG2000", no_jp2=True)
    found = np.asarray(decode_image(with_depth(data, depth), 256)).astype(int)
    assert (found[..., 0] == np.arange(256)[:, None]).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_depth(codestream([0], [1]), 1), "has 1 bits per sample, and 8 to 16 are read; convert it"),
        (with_depth(codestream([0], [1]), 24), "has 24 bits per sample, and 8 to 16 are read"),
        (
            codestream([0] * 4, [1] * 4)[:40].replace(b"\xff\x51\0\x32", b"\xff\x51\0\x35")
            + b"\0\5"
            + bytes([7, 1, 1] * 5)
            + b"\xff\x90\0\x0a\0\0\0\0\0\0",
            "has 5 components, the limit is 4; convert it to RGB",
        ),
    ],
)
def test_what_is_not_read_is_refused_as_what_it_is(data: bytes, message: str) -> None:
    with pytest.raises(InvalidImageFileError, match=f"the JPEG 2000 {message}"):
        decode_image(data, 16)


def claiming(width: int, height: int, tile: int) -> bytes:
    data = codestream([0], [1])
    return data[:8] + struct.pack(">8I", width, height, 0, 0, tile, tile, 0, 0) + data[40:]


def test_tiles_are_limited() -> None:
    header = read_header(encode(Image.new("L", (1000, 1000)), "JPEG2000", tile_size=(10, 10)))
    assert (header.width, header.height) == (1000, 1000)
    assert memory_of(header, 16, 0) > MAX_TILES * 2**14
    with pytest.raises(
        InvalidImageFileError, match="has 10100 tiles, the limit is 10000; save it with larger"
    ):
        read_header(claiming(1001, 1000, 10))
    with pytest.raises(InvalidImageFileError, match="begins as JPEG2000, but its header is damaged"):
        read_header(claiming(1000, 1000, 0))


@pytest.mark.parametrize("num_tiles", [1, 6, 11])
def test_missing_tiles_are_damage_and_not_black(num_tiles: int) -> None:
    data = encode(noise(128, 96), "JPEG2000", no_jp2=True, tile_size=(32, 32))
    starts = [match.start() for match in re.finditer(b"\xff\x90\0\x0a", data)]
    assert len(starts) == 12
    with pytest.raises(
        InvalidImageFileError, match=f"has {num_tiles} of its 12 tiles, .* send the file whole"
    ):
        decode_image(data[: starts[num_tiles]] + b"\xff\xd9", 16)


def test_the_length_of_the_last_tile_may_be_left_open() -> None:
    data = bytearray(codestream([1, 2, 3], [4, 5, 6]))
    start = data.index(b"\xff\x90\0\x0a")
    data[start + 6 : start + 10] = bytes(4)
    assert colors(bytes(data)) == ((1, 2, 3), (4, 5, 6))


def test_a_size_beyond_the_limits_is_refused_from_the_header() -> None:
    with pytest.raises(InvalidImageFileError, match="81 Mpx, the limit is 40 Mpx"):
        decode_image(claiming(9000, 9000, 9000), 16, max_pixels=40_000_000)
    with pytest.raises(InvalidImageFileError, match="the limit of a side is 65535 px"):
        decode_image(claiming(65_536, 1, 65_536), 16)
    with pytest.raises(InvalidImageFileError, match="has no pixels"):
        decode_image(claiming(0, 1, 16), 16)


@pytest.mark.parametrize("size", [(8, 8), (4096, 4096)])
def test_boxes_that_lie_about_the_size_are_damage(size: tuple[int, int]) -> None:
    with pytest.raises(InvalidImageFileError, match="the JPEG2000 is damaged"):
        decode_image(jp2(codestream([1, 2, 3], [4, 5, 6]), RGB, size=size), 16)


@pytest.mark.parametrize(
    "rest", [b"\0", bytes(99), b"\xff" * 9, b"a text", b"\0\0\0\x0cfree", noise(9, 9).tobytes()]
)
def test_bytes_behind_the_end_do_not_count(rest: bytes) -> None:
    expected = ((1, 2, 3), (9, 8, 7))
    data = codestream([1, 2, 3], [9, 8, 7])
    assert colors(data + rest) == expected
    assert colors(jp2(data, RGB) + rest) == expected
    assert colors(jp2(data + rest, RGB)) == expected


def test_boxes_without_a_codestream_are_damage() -> None:
    with pytest.raises(InvalidImageFileError, match="begins as JPEG2000, but its header is damaged"):
        read_header(jp2(codestream([1], [2]), GREY).replace(b"jp2c", b"free"))
