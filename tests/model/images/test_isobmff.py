"""AVIF and HEIC: orientation, grids, depths, and headers that are damaged or lie."""

import io
import struct
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from model.errors import InvalidImageFileError, UnknownImageFormatError
from model.images.decoding import decode_image
from model.images.header import read_header, sniff_format
from model.images.isobmff import MAX_BOXES
from tests.image_files import encode, noise
from tests.isobmff_files import box, encode_heic, mirrored, picture_file, rotated

KINDS = ["AVIF", "HEIC"]
MAX_ERROR = 2.0  # of 255, on average: both are lossy
EXIF = Image.Exif()
EXIF[0x0112] = 6
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'


def quarters() -> np.ndarray:
    """Return a picture of which no two orientations are equal: [64, 64, 3]."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32] = (200, 30, 30)
    picture[:, :16] = (20, 20, 220)
    return picture


PICTURE = Image.fromarray(quarters())


def error(data: bytes, expected: np.ndarray) -> float:
    """Return the mean difference of a file of [S, S, 3] from what is expected."""
    return float(np.abs(np.asarray(decode_image(data, len(expected))).astype(int) - expected).mean())


def heic(pixels: np.ndarray, mode: str, **options: object) -> bytes:
    """Encode without loss; modes of 16 bits by their upper 10 or 12."""
    encode_heic()
    buffer = io.BytesIO()
    height, width = pixels.shape[:2]
    pillow_heif.from_bytes(mode, (width, height), pixels.tobytes()).save(buffer, quality=-1, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("exif", [b"", EXIF.tobytes(), b"no exif at all"])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_the_orientation_is_that_of_the_properties_alone(
    kind: str, turns: int, axis: int | None, exif: bytes
) -> None:
    expected = np.rot90(quarters(), turns)
    if axis is not None:
        expected = np.flip(expected, axis)
    properties = [rotated(turns), *([] if axis is None else [mirrored(axis)])]
    assert error(picture_file(kind, [PICTURE], properties=properties, exif=exif), expected) < MAX_ERROR


@pytest.mark.parametrize("kind", KINDS)
def test_an_orientation_in_exif_or_xmp_alone_is_none(kind: str) -> None:
    assert error(picture_file(kind, [PICTURE], exif=EXIF.tobytes()), quarters()) < MAX_ERROR
    encode_heic()
    with_xmp = encode(PICTURE, {"HEIC": "HEIF"}.get(kind, kind), xmp=XMP)
    assert XMP in with_xmp
    # pillow-heif writes it as a rotation too.
    assert error(with_xmp.replace(b"irot\3", b"irot\0"), quarters()) < MAX_ERROR


COLORS = ["red", "lime", "blue", "white", "black", "gray"]


@pytest.mark.parametrize("size", [(192, 128), (180, 100)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_tiles_of_a_grid_are_put_together(kind: str, size: tuple[int, int]) -> None:
    tiles = [Image.new("RGB", (64, 64), color) for color in COLORS]
    data = picture_file(kind, tiles, num_columns=3, size=size)
    header = read_header(data)
    assert (header.width, header.height) == size
    found = np.asarray(decode_image(data, 48)).astype(int)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, 3)
        expected = np.array(tile.getpixel((0, 0)))
        assert np.abs(found[8 + 32 * row, 8 + 16 * column] - expected).max() <= 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_primary_image_is_read_of_several(kind: str) -> None:
    if kind == "AVIF":
        data = encode(PICTURE, "AVIF", quality=95, save_all=True, append_images=[noise(64, 64)])
    else:
        file = pillow_heif.from_pillow(noise(80, 64))
        file.add_from_pillow(PICTURE)
        buffer = io.BytesIO()
        file.save(buffer, quality=-1, primary_index=1)
        data = buffer.getvalue()
    assert (read_header(data).width, read_header(data).height) == (64, 64)
    assert error(data, quarters()) < MAX_ERROR


RGBA = np.dstack([quarters(), np.full((64, 64), 51, np.uint8)])
ON_WHITE = quarters() * 0.2 + 255 * 0.8
RAMP = np.tile(np.linspace(0, 65_535, 64).astype(np.uint16), (64, 1))
GREY_RAMP = np.dstack([RAMP >> 8] * 3)
VALUES: dict[str, tuple[Callable[[], bytes], np.ndarray]] = {
    "AVIF with alpha": (lambda: encode(Image.fromarray(RGBA), "AVIF", quality=95), ON_WHITE),
    "AVIF with premultiplied alpha": (
        lambda: encode(Image.fromarray(RGBA), "AVIF", quality=95, alpha_premultiplied=True),
        ON_WHITE,
    ),
    "AVIF of the limited range": (
        lambda: encode(PICTURE, "AVIF", quality=95, range="limited"),
        quarters(),
    ),
    "grey AVIF": (
        lambda: encode(Image.fromarray(GREY_RAMP.astype(np.uint8)).convert("L"), "AVIF"),
        GREY_RAMP,
    ),
    "HEIC with alpha": (lambda: heic(RGBA, "RGBA"), ON_WHITE),
    "HEIC with premultiplied alpha": (
        lambda: heic(np.asarray(Image.fromarray(RGBA).convert("RGBa")), "RGBa"),
        ON_WHITE,
    ),
    "deep HEIC": (lambda: heic(quarters().astype(np.uint16) * 257, "RGB;16", chroma=444), quarters()),
    "deep HEIC with alpha": (lambda: heic(RGBA.astype(np.uint16) * 257, "RGBA;16", chroma=444), ON_WHITE),
    "grey HEIC": (lambda: heic((RAMP >> 8).astype(np.uint8), "L"), GREY_RAMP),
    "deep grey HEIC": (lambda: heic(RAMP, "L;16"), GREY_RAMP),
}


@pytest.mark.parametrize("name", VALUES)
def test_depth_range_and_transparency_have_their_values(name: str) -> None:
    build_file, expected = VALUES[name]
    assert error(build_file(), expected) < MAX_ERROR


@pytest.mark.parametrize("kind", KINDS)
def test_a_size_beyond_the_limits_is_refused_from_the_header(kind: str) -> None:
    for size, message in (((9000, 9000), "81 Mpx, the limit is 40 Mpx"), ((65_536, 9), "limit of a side")):
        with pytest.raises(InvalidImageFileError, match=message):
            decode_image(picture_file(kind, [PICTURE], size=size), 16, max_pixels=40_000_000)


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_are_limited(kind: str) -> None:
    data = picture_file(kind, [PICTURE])
    meta = data.index(b"meta") - 4
    filled = data[:meta] + box(b"free", b"") * (MAX_BOXES + 1) + data[meta:]
    with pytest.raises(InvalidImageFileError, match="more than 10000 boxes side by side, or parts; save it"):
        read_header(filled)


@pytest.mark.parametrize("kind", KINDS)
def test_a_grid_that_is_cut_off_is_refused_whatever_is_left(kind: str) -> None:
    data = picture_file(kind, [noise(64, 64, seed=seed) for seed in range(4)], num_columns=2)
    assert decode_image(data + b"trailer of a phone", 64).tobytes() == decode_image(data, 64).tobytes()
    for end in (*range(data.index(b"mdat"), len(data), 997), len(data) - 1):
        with pytest.raises(
            InvalidImageFileError, match=r"the (AVIF|HEIC) ends before its last pixels; send it whole"
        ):
            decode_image(data[:end], 64)


@pytest.mark.parametrize("kind", KINDS)
def test_items_are_limited(kind: str) -> None:
    data = picture_file(kind, [PICTURE])
    start = data.index(b"iloc") + 4
    for num_items, num_parts in ((0xFFFF, 0), (1, 0xFFFF)):
        many = struct.pack(">5H", num_items, 1, 0, 0, num_parts) + bytes(2**20)
        located = box(b"iloc", data[start : start + 6] + many)
        meta = data.index(b"meta")
        changed = located + data[meta + 8 : start - 8]
        with pytest.raises(InvalidImageFileError, match="more than 10000 boxes side by side, or parts"):
            read_header(data[: meta - 4] + box(b"meta", bytes(4) + changed))


def without(data: bytes, kind: bytes) -> bytes:
    return data.replace(kind, b"none")


@pytest.mark.parametrize("absent", [b"meta", b"pitm", b"iprp", b"ipco", b"ipma", b"ispe"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_header_without_a_part_is_damaged(kind: str, absent: bytes) -> None:
    with pytest.raises(InvalidImageFileError, match=f"begins as {kind}, but its header is damaged"):
        read_header(without(picture_file(kind, [PICTURE]), absent))


@pytest.mark.parametrize("kind", KINDS)
def test_a_film_without_a_still_picture_is_refused_as_such(kind: str) -> None:
    data = without(picture_file(kind, [PICTURE]), b"meta") + box(b"moov", b"")
    with pytest.raises(InvalidImageFileError, match="a film without a still picture; send one of its frames"):
        read_header(data)


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\0\0\0\x14ftypavif\0\0\0\0mif1", "AVIF"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0miafavif", "AVIF"),
        (b"\0\0\0\x14ftypavis\0\0\0\0msf1", "AVIF"),
        (b"\0\0\0\x14ftypheic\0\0\0\0mif1", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x14ftyphevc\0\0\0\0msf1", "HEIC"),
    ],
)
def test_the_format_is_known_by_its_brands(start: bytes, name: str) -> None:
    assert sniff_format(start) == name


@pytest.mark.parametrize("brands", [b"mp42\0\0\0\0isom", b"isom\0\0\0\0avif", b"mif1\0\0\0\0miaf", b"avif"])
def test_other_brands_are_no_images_that_are_read(brands: bytes) -> None:
    is_read = brands == b"avif"  # a header that is cut off
    try:
        assert (sniff_format(b"\0\0\0\x14ftyp" + brands) == "AVIF") is is_read
    except UnknownImageFormatError:
        assert not is_read


PROGRAM = """
import sys
sys.modules["pillow_heif"] = sys.modules["PIL._avif"] = None  # as if they were not installed
from model.errors import UnknownImageFormatError
from model.images.decoding import decode_image
try:
    decode_image(sys.stdin.buffer.read(), 16)
except UnknownImageFormatError as exc:
    print(exc)
"""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("AVIF", "the file is AVIF, which is read where Pillow is built with AVIF, as its wheels are; or"),
        ("HEIC", "HEIC, which is read where the extra heic is installed (pip install pillow-heif)"),
    ],
)
def test_without_its_decoder_a_file_is_refused_with_what_to_install(kind: str, message: str) -> None:
    data = picture_file(kind, [PICTURE])
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=data, capture_output=True, check=True)
    assert message in done.stdout.decode()
