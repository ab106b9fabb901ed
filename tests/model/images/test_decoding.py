"""Decoding: true files of odd kinds are read, and what is damaged is refused with a cure."""

import contextlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from model.errors import InvalidImageFileError, UnknownImageFormatError
from model.images.decoding import decode_image
from model.images.header import find_warnings
from model.images.png import MAX_CHUNKS
from tests.image_files import encode, noise, one_of_each_type, png, png_chunk, png_of_zeros, tiff
from tests.isobmff_files import encode_heic

FILES = one_of_each_type()
RGB_ROWS = [row.tobytes() for row in np.asarray(noise(32, 32))]
NOTE = b'{"node": 1}' * 200_000  # 2.2 MB


def pixels(data: bytes, side: int = 32) -> np.ndarray:
    return np.asarray(decode_image(data, side)).astype(int)


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"16-bit png"}))  # which Pillow clips
def test_each_type_of_file_is_equal_to_what_pillow_makes_of_it(name: str) -> None:
    with Image.open(io.BytesIO(FILES[name])) as image:
        white = Image.new("RGBA", image.size, "white")
        is_transparent = "A" in image.getbands() or "transparency" in image.info
        opaque = Image.alpha_composite(white, image.convert("RGBA")) if is_transparent else image
        expected = opaque.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels(FILES[name]), np.asarray(expected))


METADATA = {
    "zTXt": b"workflow\0\0" + zlib.compress(NOTE),
    "iTXt": b"workflow\0\1\0\0\0" + zlib.compress(NOTE),
    "tEXt": b"workflow\0" + NOTE,
    "iCCP": b"profile\0\0" + zlib.compress(bytes(2_000_000)),
    "eXIf": b"no exif at all",
    "prVt": bytes(2_000_000),
}


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_of_any_size_do_not_cost_the_picture(kind: str) -> None:
    chunk = png_chunk(kind.encode(), METADATA[kind])
    expected = pixels(png(32, 32, RGB_ROWS))
    assert np.array_equal(pixels(png(32, 32, RGB_ROWS, before=chunk)), expected)
    assert np.array_equal(pixels(png(32, 32, RGB_ROWS, after=chunk)), expected)


def test_a_bomb_in_metadata_is_not_unpacked() -> None:
    bomb = png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(500_000_000), 9))
    assert np.array_equal(pixels(png(32, 32, RGB_ROWS, before=bomb)), pixels(png(32, 32, RGB_ROWS)))


def test_the_orientation_in_xmp_and_in_a_text_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    text = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n      40\n" + exif.tobytes().hex().encode())
    expected = np.rot90(pixels(png(32, 32, RGB_ROWS)), 3)
    for chunk in (png_chunk(b"iTXt", xmp), png_chunk(b"zTXt", text), png_chunk(b"eXIf", exif.tobytes()[6:])):
        assert np.array_equal(pixels(png(32, 32, RGB_ROWS, before=chunk)), expected)
        assert np.array_equal(pixels(png(32, 32, RGB_ROWS, after=chunk)), expected)


def test_chunks_of_a_png_are_limited() -> None:
    chunk = png_chunk(b"tEXt", b"")
    assert pixels(png(32, 32, RGB_ROWS, before=chunk * (MAX_CHUNKS - 3))).shape == (32, 32, 3)
    with pytest.raises(InvalidImageFileError, match="more than 100000 chunks"):
        decode_image(png(32, 32, RGB_ROWS, before=chunk * (MAX_CHUNKS - 2)), 32)


def with_bad_checksum(kind: bytes, content: bytes) -> bytes:
    chunk = bytearray(png_chunk(kind, content))
    chunk[-1] ^= 1
    return bytes(chunk)


ANCILLARY: dict[str, tuple[bytes, str]] = {
    "tRNS": (bytes(6), "the PNG's chunk tRNS has a wrong checksum; the transparency was ignored"),
    "eXIf": (b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0", "the orientation was ignored"),
    "iTXt": (b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>', ""),
    "zTXt": (b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 0\n"), ""),
    "tEXt": (b"a\0b", ""),
    "gAMA": (bytes(4), ""),
    "iCCP": (b"profile\0\0" + zlib.compress(bytes(99)), ""),
    "pHYs": (b"\1", ""),
}


@pytest.mark.parametrize("kind", ANCILLARY)
@pytest.mark.parametrize("where", ["before", "after"])
def test_a_wrong_checksum_in_an_ancillary_chunk_costs_the_chunk_alone(kind: str, where: str) -> None:
    content, warning = ANCILLARY[kind]
    chunk = with_bad_checksum(kind.encode(), content)
    data = png(32, 32, RGB_ROWS, **{where: chunk})  # type: ignore[arg-type]
    assert np.array_equal(pixels(data), pixels(png(32, 32, RGB_ROWS)))
    assert [warning in found for found in find_warnings(data)] == ([True] if warning else [])


def test_a_wrong_checksum_in_a_critical_chunk_is_damage() -> None:
    data = png(32, 32, [bytes(32)] * 32, color_type=3, before=with_bad_checksum(b"PLTE", bytes(6)))
    with pytest.raises(InvalidImageFileError, match="begins as PNG, but its header is damaged"):
        decode_image(data, 32)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(" png") or name == "png"])
def test_pixels_of_a_png_with_a_wrong_checksum_are_damage(name: str) -> None:
    data = FILES[name]
    start = data.index(b"IDAT") + 4
    end = start + int.from_bytes(data[start - 8 : start - 4])
    flipped = [bytearray(data) for _ in range(5)]
    for copy, place in zip(flipped, (start + 5, (start + end) // 2, end - 5, end - 1, end + 3), strict=True):
        copy[place] ^= 1
    cut = [data[:place] + bytes(len(data)) for place in ((start + end) // 2, end - 9)]
    for damaged in (*flipped, *cut):
        with pytest.raises(InvalidImageFileError, match=r"the PNG's pixels are damaged or truncated"):
            decode_image(bytes(damaged), 32)


@pytest.mark.parametrize("name", FILES)
def test_a_whole_file_has_no_warnings(name: str) -> None:
    assert find_warnings(FILES[name]) == ()
    assert find_warnings(FILES[name] + bytes(9)) == ()


END_MISSING = ("the JPEG has no end marker and may be cut off; no pixels are missing",)
PHOTOS = {
    "noise": noise(200, 120),
    "one colour": Image.new("RGB", (200, 120), (9, 99, 200)),
    "grey": Image.linear_gradient("L"),
    "cmyk": noise(64, 64).convert("CMYK"),
}
JPEGS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "full colour": {"subsampling": 0},
    "restarts": {"restart_marker_rows": 1},
    "restarts after each block": {"restart_marker_blocks": 1},
}


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("photo", PHOTOS)
def test_a_jpeg_without_its_end_marker_is_read(photo: str, kind: str) -> None:
    whole = encode(PHOTOS[photo], "JPEG", **JPEGS[kind])
    for cut in (whole[:-2], whole[:-1], whole[:-2] + bytes(100)):
        assert np.array_equal(pixels(cut), pixels(whole))
        assert find_warnings(cut) == END_MISSING
    assert np.array_equal(pixels(whole + bytes(9)), pixels(whole))


@pytest.mark.parametrize("kind", [kind for kind in JPEGS if kind != "progressive"])
@pytest.mark.parametrize("photo", PHOTOS)
def test_a_jpeg_that_lacks_pixels_is_refused(photo: str, kind: str) -> None:
    whole = encode(PHOTOS[photo], "JPEG", **JPEGS[kind])
    expected, first = np.asarray(decode_image(whole, 200)), whole.index(b"\xff\xda") + 20
    for end in (*range(len(whole) - 80, len(whole) - 2), *range(first, len(whole) - 80, len(whole) // 30)):
        with contextlib.suppress(InvalidImageFileError):  # the last bits of a file may be padding
            assert np.array_equal(np.asarray(decode_image(whole[:end], 200)), expected)
            assert end >= len(whole) - 5


@pytest.mark.parametrize("photo", PHOTOS)
def test_half_a_jpeg_is_refused(photo: str) -> None:
    for options in JPEGS.values():
        whole = encode(PHOTOS[photo], "JPEG", **options)
        with pytest.raises(InvalidImageFileError, match=r"send .* whole"):
            decode_image(whole[: len(whole) * 9 // 20], 32)


def test_a_thumbnail_has_an_end_marker_of_its_own() -> None:
    thumbnail = encode(noise(16, 16), "JPEG")
    data = encode(noise(64, 64), "JPEG", exif=b"Exif\0\0" + thumbnail)
    assert find_warnings(data) == ()
    assert find_warnings(data[:-2]) == END_MISSING
    assert find_warnings(data + b"\xff\xda" + bytes(9)) == ()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [(4, 12, "12 bits per sample, and 8 are read"), (9, 2, "2 components, and 1, 3 or 4 are read")],
)
def test_a_jpeg_of_an_unread_kind_is_refused_by_name(place: int, value: int, message: str) -> None:
    data = bytearray(FILES["jpeg"])
    data[data.index(b"\xff\xc0") + place] = value
    with pytest.raises(InvalidImageFileError, match=f"the JPEG has {message}; convert it"):
        decode_image(bytes(data), 32)


FIRST, SECOND = noise(32, 32, seed=8), noise(32, 32, seed=9)
SEVERAL: dict[str, dict[str, Any]] = {
    "PNG": {"default_image": False},
    "GIF": {},
    "WEBP": {"lossless": True},
    "TIFF": {"compression": "tiff_lzw"},
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_the_first_of_several_images_is_read(kind: str) -> None:
    data = encode(FIRST, kind, save_all=True, append_images=[SECOND], **SEVERAL[kind])
    expected = pixels(encode(FIRST, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert np.array_equal(pixels(data), expected)


def test_the_first_photo_of_an_mpo_is_read() -> None:
    data = encode(FIRST, "MPO", save_all=True, append_images=[SECOND], quality=75)
    assert data.count(b"\xff\xd8\xff") == 2
    assert np.array_equal(pixels(data), pixels(encode(FIRST, "JPEG", quality=75)))


def test_an_animated_png_with_a_picture_of_its_own_shows_that() -> None:
    data = encode(FIRST, "PNG", save_all=True, append_images=[SECOND], default_image=True)
    assert np.array_equal(pixels(data), pixels(encode(FIRST, "PNG")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF", "MPO"])
def test_the_orientation_is_applied_in_each_format(kind: str, orientation: int) -> None:
    encode_heic()
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    picture.paste("red", (0, 0, 16, 64))
    data = encode(picture, kind, quality=95, exif=exif.tobytes())
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encode(picture, "PNG", exif=exif))))
    assert np.abs(np.asarray(decode_image(data, 64)).astype(int) - np.asarray(upright)).mean() < 3


def cmyk_jpeg(ink: tuple[int, int, int, int], transform: int) -> bytes:
    """Build a JPEG of one colour as Adobe's programs do: inverted. transform: 0 for CMYK, 2 for YCCK."""
    data = bytearray(encode(Image.new("CMYK", (32, 32), ink), "JPEG", quality=100))
    marker = data.index(b"\xff\xee")
    assert data[marker + 4 : marker + 9] == b"Adobe"
    data[marker + 15] = transform
    return bytes(data)


def test_the_inks_of_a_jpeg_are_inverted() -> None:
    assert np.abs(pixels(cmyk_jpeg((255, 0, 55, 0), 0)) - (0, 255, 200)).max() <= 2
    assert pixels(cmyk_jpeg((0, 0, 0, 255), 0)).max() <= 2
    # Stored: Y, Cb and Cr of 155, 128 and 128 for 155 of cyan, magenta and yellow.
    assert np.abs(pixels(cmyk_jpeg((100, 127, 127, 0), 2)) - 100).max() <= 2


def bit_rows(levels: np.ndarray, depth: int) -> list[bytes]:
    bits = ((levels[..., None] >> np.arange(depth - 1, -1, -1)) & 1).astype(np.uint8)
    return [row.tobytes() for row in np.packbits(bits.reshape(len(levels), -1), axis=1)]


@pytest.mark.parametrize(
    ("depth", "level"), [(1, 0), (2, 1), (4, 1), (4, 7), (8, 1), (16, 0), (16, 257), (16, 4096), (16, 40000)]
)
def test_the_transparent_grey_of_any_depth_turns_white(depth: int, level: int) -> None:
    levels = np.full((96, 96), 0 if level else 2**depth - 1)
    levels[:, :48] = level
    levels[:, 90:] = 2**depth - 1
    data = png(
        96, 96, bit_rows(levels, depth), depth=depth, color_type=0,
        before=png_chunk(b"tRNS", struct.pack(">H", level)),
    )  # fmt: skip
    found = pixels(data)
    assert (found[:, :12] == 255).all()
    if level:
        assert (found[:, 18:26] == 0).all()


@pytest.mark.parametrize(("depth", "level"), [(1, 0), (1, 1), (2, 2), (4, 9), (8, 0), (8, 200)])
@pytest.mark.parametrize("spare", [0, 0xFF00, 0xA500])
def test_the_spare_bits_of_a_transparent_grey_do_not_count(depth: int, level: int, spare: int) -> None:
    levels = np.full((32, 32), level)
    spare = spare if depth == 8 else spare | 0xF0 & -(2**depth)
    chunk = png_chunk(b"tRNS", struct.pack(">H", spare | level))
    data = png(32, 32, bit_rows(levels, depth), depth=depth, color_type=0, before=chunk)
    assert (pixels(data) == 255).all()


def test_the_spare_bits_of_a_transparent_colour_do_not_count() -> None:
    chunk = png_chunk(b"tRNS", struct.pack(">HHH", 0xFF01, 0x102, 0x8003))
    assert (pixels(png(32, 32, [bytes([1, 2, 3] * 32)] * 32, before=chunk)) == 255).all()
    assert (pixels(png(32, 32, [bytes([1, 2, 4] * 32)] * 32, before=chunk)) == (1, 2, 4)).all()


def test_a_palette_has_bytes_of_transparency() -> None:
    palette = png_chunk(b"PLTE", bytes([9] * 6)) + png_chunk(b"tRNS", b"\x00\xff")
    rows = [bytes([0] * 16 + [1] * 16)] * 32
    found = pixels(png(32, 32, rows, color_type=3, before=palette))
    assert (found[:, :12] == 255).all()
    assert (found[:, 20:] == 9).all()


def test_the_png_of_an_iphone_app_is_refused_by_name() -> None:
    data = png(32, 32, RGB_ROWS)
    data = data[:8] + png_chunk(b"CgBI", b"\x50\0\x20\x02") + data[8:]
    with pytest.raises(
        InvalidImageFileError, match=r"Apple's own kind .CgBI, .* save it again as a plain PNG"
    ):
        decode_image(data, 32)


@pytest.mark.parametrize("kind", ["JPEG2000", "AVIF", "HEIF"])
def test_the_error_of_a_cut_file_names_its_own_format(kind: str) -> None:
    encode_heic()
    data = encode(noise(64, 64), kind)
    name = "HEIC" if kind == "HEIF" else kind
    for part in (0.1, 0.3, 0.5, 0.9):
        with pytest.raises(InvalidImageFileError, match=name) as refused:
            decode_image(data[: int(len(data) * part)], 32)
        assert "another PNG" not in str(refused.value)
        assert "whole" in str(refused.value)


@pytest.mark.parametrize("color", [(0, 0, 0), (0x1234, 0x5678, 0x9ABC), (255, 255, 255)])
def test_the_transparent_colour_of_16_bits_turns_white(color: tuple[int, int, int]) -> None:
    levels = np.full((96, 96, 3), 0x4000, dtype=">u2")
    levels[:, :48] = color
    rows = [row.tobytes() for row in levels]
    data = png(96, 96, rows, depth=16, before=png_chunk(b"tRNS", struct.pack(">HHH", *color)))
    found = pixels(data)
    assert (found[:, :12] == 255).all()
    assert (found[:, 20:] == 0x40).all()


def test_a_tiff_of_12_bits_is_scaled_by_its_own_range() -> None:
    levels = np.full((96, 96), 4095, np.uint32)
    levels[:, 48:] = 600
    left, right = levels[:, 0::2], levels[:, 1::2]
    parts = [left >> 4, ((left & 15) << 4) | (right >> 8), right & 255]
    found = pixels(tiff(np.stack(parts, 2).astype(np.uint8).tobytes(), 96, 96, depth=12))
    assert (found[:, :12] == 255).all()
    assert (found[:, 20:] == 600 >> 4).all()


def test_a_tiff_of_16_bits_may_have_white_as_zero() -> None:
    levels = np.zeros((32, 32), "<u2")
    levels[:, 16:] = 65_535
    found = pixels(tiff(levels.tobytes(), 32, 32, depth=16, photometric=0))
    assert (found[:, :12] == 255).all()
    assert (found[:, 20:] == 0).all()


def test_a_frame_larger_than_its_canvas_is_limited() -> None:
    data = bytearray(encode(noise(8, 8).convert("P"), "GIF"))
    start = data.index(b",", 13 + 3 * 2 ** ((data[10] & 7) + 1))  # of the frame, behind the palette
    data[start + 5 : start + 9] = struct.pack("<HH", 65_535, 65_535)
    with pytest.raises(InvalidImageFileError, match="65535 x 65535 = 4295 Mpx, the limit is"):
        decode_image(bytes(data), 32)


@pytest.mark.parametrize("name", [name for name in FILES if "tiff" not in name])
def test_a_file_without_pixels_is_refused(name: str) -> None:
    with pytest.raises(InvalidImageFileError, match=r"whole|empty|no pixels"):
        decode_image(FILES[name][:40], 32)


def test_no_other_format_is_opened_whatever_its_name(tmp_path: Path) -> None:
    for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", encode(noise(8, 8), "PPM")):
        with pytest.raises(UnknownImageFormatError, match="none of JPEG, PNG"):
            decode_image(data, 32)


def test_an_image_of_the_longest_side_is_read() -> None:
    assert pixels(png_of_zeros(1, 65_535)).max() == 0
    assert pixels(png_of_zeros(65_535, 1)).max() == 0
