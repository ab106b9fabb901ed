"""The values of pixels, by hand: colour model, depth, transparency and byte order of TIFF and PNG files.

Each picture has two halves, of one colour each.
"""

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import pytest

from model.errors import InvalidImageFileError
from model.images.decoding import decode_image
from tests.image_files import png, png_chunk
from tests.tiff_files import Tags, pack_samples, tiff_of

Color = tuple[int, ...]
ALPHA, PREMULTIPLIED, UNSPECIFIED = ({338: (3, [kind])} for kind in (2, 1, 0))
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def halves(left: Sequence[int], right: Sequence[int]) -> np.ndarray:
    samples = np.empty((16, 16, len(left)), np.int64)
    samples[:, :8], samples[:, 8:] = left, right
    return samples


def colors(data: bytes) -> tuple[Color, Color]:
    """Return the colours of the two halves, each of which must be of one colour."""
    pixels = np.asarray(decode_image(data, 16))
    left, right = pixels[:, :8].reshape(-1, 3), pixels[:, 8:].reshape(-1, 3)
    assert (left == left[0]).all()
    assert (right == right[0]).all()
    return tuple(map(int, left[0])), tuple(map(int, right[0]))


def grey(level: int) -> Color:
    return (level, level, level)


PALETTE_4 = [level << 8 for level in range(16 * 3)]
PALETTE_8 = [level << 8 for level in (*range(256), *reversed(range(256)), *[0] * 256)]
# Photometric interpretation, bits per sample, samples of the two halves, further tags, colours of the halves.
# 16 bits become 8 by their upper byte, 12 by their upper 8 bits, fewer than 8 by the share of their range.
TIFFS: dict[str, tuple[int, int, Sequence[int], Sequence[int], Tags, Color, Color]] = {
    "white is zero, 1 bit": (0, 1, [0], [1], {}, WHITE, BLACK),
    "white is zero, 2 bits": (0, 2, [0], [1], {}, WHITE, grey(170)),
    "white is zero, 4 bits": (0, 4, [15], [4], {}, BLACK, grey(187)),
    "white is zero, 8 bits": (0, 8, [255], [55], {}, BLACK, grey(200)),
    "white is zero, 12 bits": (0, 12, [4095], [0x370], {}, BLACK, grey(200)),
    "white is zero, 16 bits": (0, 16, [65535], [0x3700], {}, BLACK, grey(200)),
    "grey, 1 bit": (1, 1, [0], [1], {}, BLACK, WHITE),
    "grey, 2 bits": (1, 2, [2], [3], {}, grey(170), WHITE),
    "grey, 4 bits": (1, 4, [3], [15], {}, grey(51), WHITE),
    "grey, 8 bits": (1, 8, [7], [254], {}, grey(7), grey(254)),
    "grey, 12 bits": (1, 12, [600], [4095], {}, grey(37), WHITE),
    "grey, 16 bits": (1, 16, [0x12FF], [65535], {}, grey(0x12), WHITE),
    "grey with a sample of no meaning": (1, 8, [100, 0], [200, 255], UNSPECIFIED, grey(100), grey(200)),
    "grey with alpha": (1, 8, [55, 51], [100, 255], ALPHA, grey(215), grey(100)),
    "grey with premultiplied alpha": (1, 8, [11, 51], [100, 255], PREMULTIPLIED, grey(215), grey(100)),
    "RGB, 8 bits": (2, 8, [1, 2, 3], [255, 128, 0], {}, (1, 2, 3), (255, 128, 0)),
    "RGB, 16 bits": (2, 16, [0x1FF, 0x200, 0], [65535, 0x8000, 9], {}, (1, 2, 0), (255, 128, 0)),
    "RGB with a sample of no meaning": (2, 8, [1, 2, 3, 0], [9, 9, 9, 9], UNSPECIFIED, (1, 2, 3), grey(9)),
    "RGB with alpha": (2, 8, [55, 5, 255, 51], [9, 8, 7, 255], ALPHA, (215, 205, 255), (9, 8, 7)),
    "RGB with premultiplied alpha": (
        2, 8, [11, 1, 51, 51], [9, 8, 7, 255], PREMULTIPLIED, (215, 205, 255), (9, 8, 7)
    ),
    "RGB with alpha, 16 bits": (
        2, 16, [0x3700, 0x500, 65535, 0x33FF], [0, 0, 0, 0], ALPHA, (215, 205, 255), WHITE
    ),
    "RGB with premultiplied alpha, 16 bits": (
        2, 16, [0xB00, 0x100, 0x3300, 0x3300], [0x9FF, 0x800, 0x700, 0xFF00], PREMULTIPLIED,
        (215, 205, 255), (9, 8, 7),
    ),
    "RGB with a sample of no meaning, 16 bits": (
        2, 16, [0x1FF, 0x200, 0, 0], [65535, 0x8000, 9, 9], UNSPECIFIED, (1, 2, 0), (255, 128, 0)
    ),
    "RGB with alpha and one more": (
        2, 8, [55, 5, 255, 51, 9], [9, 8, 7, 255, 0], {338: (3, [2, 0])}, (215, 205, 255), (9, 8, 7)
    ),
    "RGB and an unexplained sample": (2, 8, [55, 5, 255, 51], [9, 8, 7, 255], {}, (215, 205, 255), (9, 8, 7)),
    "palette, 1 bit": (
        3, 1, [1], [0], {320: (3, [0xFFFF, 0x100, 0x8000, 0x200, 0, 0x300])}, (1, 2, 3), (255, 128, 0)
    ),
    "palette, 4 bits": (3, 4, [1], [15], {320: (3, PALETTE_4)}, (1, 17, 33), (15, 31, 47)),
    "palette, 8 bits": (3, 8, [1], [200], {320: (3, PALETTE_8)}, (1, 254, 0), (200, 55, 0)),
    "palette with alpha": (
        3, 8, [100, 51], [200, 255], {320: (3, PALETTE_8), **ALPHA}, (224, 235, 204), (200, 55, 0)
    ),
    "palette, 2 bits": (
        3, 2, [1], [3], {320: (3, [0, 0x100, 0, 0xFFFF, 0, 0x200, 0, 0x8000, 0, 0x300, 0, 0])},
        (1, 2, 3), (255, 128, 0),
    ),
    "CMYK, 8 bits": (5, 8, [255, 0, 55, 0], [0, 0, 0, 255], {}, (0, 255, 200), BLACK),
    "CMYK with a sample of no meaning": (
        5, 8, [255, 0, 55, 0, 9], [0, 0, 0, 255, 9], UNSPECIFIED, (0, 255, 200), BLACK
    ),
    "CMYK, 16 bits": (5, 16, [65535, 0, 0x3700, 0], [0, 0, 0, 65535], {}, (0, 255, 200), BLACK),
    # R = Y + 1.402 (Cr - 128), G = Y - .344 (Cb - 128) - .714 (Cr - 128), B = Y + 1.772 (Cb - 128)
    "YCbCr": (6, 8, [100, 128, 128], [127, 63, 255], {530: (3, [1, 1])}, grey(100), (255, 59, 12)),
}  # fmt: skip
UNREAD_IN_PLANES = {
    "grey with a sample of no meaning",
    "grey with alpha",
    "grey with premultiplied alpha",
    "RGB with alpha and one more",
    "RGB and an unexplained sample",
    "palette with alpha",
}
IN_PLANES = sorted({name for name in TIFFS if len(TIFFS[name][2]) > 1} - UNREAD_IN_PLANES)


@pytest.mark.parametrize("is_deflated", [False, True])
@pytest.mark.parametrize(("order", "is_big"), [("<", False), (">", False), ("<", True)])
@pytest.mark.parametrize("name", TIFFS)
def test_a_tiff_has_the_values_of_its_samples(name: str, order: str, is_big: bool, is_deflated: bool) -> None:
    photometric, depth, left, right, tags, *expected = TIFFS[name]
    samples = halves(left, right)
    data = tiff_of(
        samples, depth, photometric, order=order, is_big=is_big, is_deflated=is_deflated, tags=tags
    )
    assert colors(data) == tuple(expected)


@pytest.mark.parametrize("is_deflated", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("name", IN_PLANES)
def test_a_tiff_in_planes_has_the_same_values(name: str, order: str, is_deflated: bool) -> None:
    photometric, depth, left, right, tags, *expected = TIFFS[name]
    samples = halves(left, right)
    data = tiff_of(
        samples, depth, photometric, order=order, in_planes=True, is_deflated=is_deflated, tags=tags
    )
    assert colors(data) == tuple(expected)


def test_a_tiff_without_compression_may_sample_its_colours() -> None:
    block = bytes([100] * 4 + [128] * 2)  # of two by two pixels
    tags: Tags = {258: (3, [8, 8, 8]), 277: (3, [3]), 530: (3, [2, 2])}
    content = np.frombuffer(block * 64, np.uint8).reshape(16, 24, 1)
    data = tiff_of(content, 8, 6, tags={**tags, 256: (4, [16])})
    assert colors(data) == (grey(100), grey(100))


def test_the_bits_of_a_tiff_may_be_stored_from_the_right() -> None:
    assert colors(tiff_of(halves([3], [8]), 4, 1, tags={266: (3, [2])})) == (grey(204), grey(17))
    assert colors(tiff_of(halves([3], [8]), 8, 1, tags={266: (3, [2])})) == (grey(192), grey(16))


SIGNED, FLOAT, UNDEFINED = ({339: (3, [kind])} for kind in (2, 3, 4))
# Photometric interpretation, bits, number of samples, further tags, what the refusal calls it.
UNREAD_TIFFS: list[tuple[int, int, int, Tags, str]] = [
    (1, 8, 1, SIGNED, "grey, 1 sample, 8 bits per sample, signed, and nothing says which values are black"),
    (1, 16, 1, SIGNED, "16 bits per sample, signed"),
    (0, 16, 1, SIGNED, "grey with white as zero, 1 sample, 16 bits per sample, signed"),
    (1, 32, 1, SIGNED, "32 bits per sample, signed"),
    (1, 32, 1, {}, "grey, 1 sample, 32 bits per sample, and nothing says which values are black"),
    (1, 16, 1, FLOAT, "16 bits per sample, floating point"),
    (1, 32, 1, FLOAT, "32 bits per sample, floating point"),
    (2, 32, 3, FLOAT, "RGB, 3 samples, 32 bits per sample, floating point"),
    (1, 8, 1, UNDEFINED, "8 bits per sample, of undefined type"),
    (1, 16, 2, ALPHA, "grey with alpha, 2 samples, 16 bits per sample, and that is not read"),
    (1, 16, 2, PREMULTIPLIED, "grey with premultiplied alpha, 2 samples, 16 bits"),
    (1, 8, 2, {}, "grey, 2 samples, 8 bits per sample, and that is not read"),
    (1, 10, 1, {}, "grey, 1 sample, 10 bits per sample, and that is not read"),
    (2, 4, 3, {}, "RGB, 3 samples, 4 bits per sample, and that is not read"),
    (2, 8, 3, {258: (3, [5, 6, 5])}, "RGB, 3 samples, 5 and 6 bits per sample"),
    (
        0,
        8,
        2,
        ALPHA,
        "grey with white as zero with alpha, 2 samples, 8 bits per sample, and that is not read",
    ),
    (1, 24, 1, {}, "grey, 1 sample, 24 bits per sample, and nothing says which values are black"),
    (1, 64, 1, FLOAT, "64 bits per sample, floating point"),
    (1, 32, 1, {339: (3, [5])}, "32 bits per sample, complex, and nothing says"),
    (2, 1, 3, {}, "RGB, 3 samples, 1 bits per sample"),
    (2, 12, 3, {}, "RGB, 3 samples, 12 bits per sample"),
    (2, 8, 5, {338: (3, [0, 2])}, "RGB with an unspecified sample with alpha, 5 samples"),
    (3, 16, 1, {320: (3, [0] * 9)}, "palette colours, 1 sample, 16 bits per sample"),
    (5, 1, 4, {}, "CMYK, 4 samples, 1 bits per sample"),
    (5, 8, 5, ALPHA, "CMYK with alpha, 5 samples, 8 bits per sample"),
    (6, 8, 4, UNSPECIFIED, "YCbCr with an unspecified sample, 4 samples"),
    (9, 8, 3, {}, "ICCLab, 3 samples"),
    (10, 8, 3, {}, "ITULab, 3 samples"),
    (32844, 16, 1, {339: (3, [2])}, "LogL, 1 sample, 16 bits per sample, signed"),
    (8, 8, 3, {}, "CIELab, 3 samples, 8 bits per sample, and that is not read"),
    (4, 1, 1, {}, "a transparency mask, 1 sample"),
    (32803, 16, 1, {}, "raw camera data, 1 sample, 16 bits"),
    (7, 8, 1, {}, "photometric interpretation 7"),
    (6, 16, 3, {}, "YCbCr, 3 samples, 16 bits per sample, and that is not read"),
    (1, 8, 1, {259: (3, [34712])}, "compressed by method 34712, which is not read; save it with LZW"),
]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("photometric", "depth", "num_samples", "tags", "message"), UNREAD_TIFFS)
def test_a_tiff_that_is_not_read_is_refused_as_what_it_is(
    photometric: int, depth: int, num_samples: int, tags: Tags, message: str, order: str
) -> None:
    samples = halves([0] * num_samples, [1] * num_samples)
    with pytest.raises(InvalidImageFileError, match=message) as refusal:
        decode_image(tiff_of(samples, depth, photometric, order=order, tags=tags), 16)
    assert "damaged" not in str(refusal.value)
    assert "; convert it to 8 bits, RGB or grey" in str(refusal.value) or "; save it" in str(refusal.value)


@pytest.mark.parametrize("name", sorted(UNREAD_IN_PLANES))
def test_planes_that_are_not_read_are_refused_as_what_they_are(name: str) -> None:
    photometric, depth, left, right, tags, *_ = TIFFS[name]
    with pytest.raises(InvalidImageFileError, match=r"samples, 8 bits .* each sample in a plane of its own"):
        decode_image(tiff_of(halves(left, right), depth, photometric, in_planes=True, tags=tags), 16)


def test_a_big_endian_bigtiff_is_refused_by_name() -> None:
    with pytest.raises(InvalidImageFileError, match="a BigTIFF in big-endian order, which is not read"):
        decode_image(tiff_of(halves([0], [9]), 8, 1, order=">", is_big=True), 16)


# Colour type, depth, samples of the halves, the chunks PLTE and tRNS, colours of the halves.
PNGS: dict[str, tuple[int, int, Sequence[int], Sequence[int], bytes, Color, Color]] = {
    "grey, 1 bit": (0, 1, [0], [1], b"", BLACK, WHITE),
    "grey, 2 bits": (0, 2, [1], [2], b"", grey(85), grey(170)),
    "grey, 4 bits": (0, 4, [3], [14], b"", grey(51), grey(238)),
    "grey, 8 bits": (0, 8, [3], [254], b"", grey(3), grey(254)),
    "grey, 16 bits": (0, 16, [0x3FF], [0xFEFF], b"", grey(3), grey(254)),
    "grey, 1 bit, transparent": (0, 1, [0], [1], png_chunk(b"tRNS", b"\0\0"), WHITE, WHITE),
    "grey, 2 bits, transparent": (0, 2, [1], [2], png_chunk(b"tRNS", b"\0\1"), WHITE, grey(170)),
    "grey, 4 bits, transparent": (0, 4, [3], [14], png_chunk(b"tRNS", b"\0\3"), WHITE, grey(238)),
    "grey, 8 bits, transparent": (0, 8, [3], [4], png_chunk(b"tRNS", b"\0\3"), WHITE, grey(4)),
    "grey, 16 bits, transparent": (0, 16, [0x3FF], [0x300], png_chunk(b"tRNS", b"\3\xff"), WHITE, grey(3)),
    "RGB, 8 bits": (2, 8, [1, 2, 3], [4, 5, 6], b"", (1, 2, 3), (4, 5, 6)),
    "RGB, 8 bits, transparent": (
        2, 8, [1, 2, 3], [1, 2, 4], png_chunk(b"tRNS", bytes([0, 1, 0, 2, 0, 3])), WHITE, (1, 2, 4)
    ),
    "RGB, 16 bits": (2, 16, [0x1FF, 0x2FF, 0], [0x4FF, 0, 6], b"", (1, 2, 0), (4, 0, 0)),
    "RGB, 16 bits, transparent": (
        2, 16, [0x101, 0x202, 0x303], [0x101, 0x202, 0x304], png_chunk(b"tRNS", bytes([1, 1, 2, 2, 3, 3])),
        WHITE, (1, 2, 3),
    ),
    "RGB, 16 bits, transparent, same lower bytes": (
        2, 16, [0x101, 0x202, 0x303], [0x101, 0x302, 0x303], png_chunk(b"tRNS", bytes([1, 1, 2, 2, 3, 3])),
        WHITE, (1, 3, 3),
    ),
    "palette, 1 bit": (3, 1, [0], [1], png_chunk(b"PLTE", bytes([1, 2, 3, 4, 5, 6])), (1, 2, 3), (4, 5, 6)),
    "palette, 2 bits, half transparent": (
        3, 2, [0], [1], png_chunk(b"PLTE", bytes([55, 5, 255, 4, 5, 6])) + png_chunk(b"tRNS", bytes([51])),
        (215, 205, 255), (4, 5, 6),
    ),
    "palette, 1 bit, transparent": (
        3, 1, [0], [1], png_chunk(b"PLTE", bytes([9, 9, 9, 55, 5, 255])) + png_chunk(b"tRNS", bytes([0, 51])),
        WHITE, (215, 205, 255),
    ),
    "palette, 4 bits": (3, 4, [0], [1], png_chunk(b"PLTE", bytes(range(6))), (0, 1, 2), (3, 4, 5)),
    "palette, 4 bits, transparent": (
        3, 4, [15], [14], png_chunk(b"PLTE", bytes([9] * 45 + [1, 2, 3])) + png_chunk(b"tRNS", bytes(15)),
        (1, 2, 3), WHITE,
    ),
    "palette, 8 bits, transparent": (
        3, 8, [1], [0], png_chunk(b"PLTE", bytes(range(6))) + png_chunk(b"tRNS", bytes([255, 0])),
        WHITE, (0, 1, 2),
    ),
    "grey with alpha, 8 bits": (4, 8, [55, 51], [9, 255], b"", grey(215), grey(9)),
    "grey with alpha, 16 bits": (4, 16, [0x37FF, 0x33FF], [0x900, 0xFF00], b"", grey(215), grey(9)),
    "RGBA, 8 bits": (6, 8, [55, 5, 255, 51], [9, 8, 7, 255], b"", (215, 205, 255), (9, 8, 7)),
    "RGBA, 16 bits": (
        6, 16, [0x37FF, 0x500, 0xFF00, 0x33FF], [0x900, 0x800, 0x7FF, 0xFF00], b"", (215, 205, 255), (9, 8, 7)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PNGS)
def test_a_png_has_the_values_of_its_samples(name: str) -> None:
    color_type, depth, left, right, chunks, *expected = PNGS[name]
    rows = [pack_samples(row[None], depth, ">") for row in halves(left, right)]
    assert colors(png(16, 16, rows, depth=depth, color_type=color_type, before=chunks)) == tuple(expected)


COLOR_SPACE = b"".join(
    png_chunk(kind, content)
    for kind, content in {
        b"gAMA": struct.pack(">I", 100_000),  # linear
        b"cHRM": struct.pack(">8I", 1, 1, 1, 1, 1, 1, 1, 1),
        b"sRGB": b"\0",
        b"iCCP": b"profile\0\0" + zlib.compress(bytes(500)),
        b"sBIT": b"\5\5\5",
    }.items()
)


@pytest.mark.parametrize("name", PNGS)
def test_gamma_and_profiles_change_no_values(name: str) -> None:
    color_type, depth, left, right, chunks, *expected = PNGS[name]
    rows = [pack_samples(row[None], depth, ">") for row in halves(left, right)]
    data = png(16, 16, rows, depth=depth, color_type=color_type, before=COLOR_SPACE + chunks)
    assert colors(data) == tuple(expected)


def bmp(depth: int, rows: bytes, palette: bytes = b"", masks: Sequence[int] = ()) -> bytes:
    """Build a bottom-up BMP of 16 x 16. masks: the bits of red, green and blue."""
    compression = 3 if masks else 0
    tables = struct.pack(f"<{len(masks)}I", *masks) + palette
    header = struct.pack("<IiiHHIIiiII", 40, 16, 16, 1, depth, compression, 0, 0, 0, len(palette) // 4, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + len(tables)) + header + tables + rows


PALETTE = bytes([3, 2, 1, 0, 6, 5, 4, 0])  # blue, green, red
BMPS = {
    "1 bit": (bmp(1, b"\0\xff\0\0" * 16, PALETTE), (1, 2, 3), (4, 5, 6)),
    "4 bits": (bmp(4, (bytes(4) + b"\x11" * 4) * 16, PALETTE), (1, 2, 3), (4, 5, 6)),
    "8 bits": (bmp(8, (bytes(8) + b"\1" * 8) * 16, PALETTE), (1, 2, 3), (4, 5, 6)),
    "16 bits, 5 each": (bmp(16, (b"\0\x7c" * 8 + b"\x1f\0" * 8) * 16), (255, 0, 0), (0, 0, 255)),
    "16 bits, 6 of green": (
        bmp(16, (b"\0\xf8" * 8 + b"\xe0\7" * 8) * 16, masks=(0xF800, 0x7E0, 0x1F)), (255, 0, 0), (0, 255, 0)
    ),
    "24 bits": (bmp(24, (b"\3\2\1" * 8 + b"\6\5\4" * 8) * 16), (1, 2, 3), (4, 5, 6)),
    "32 bits": (bmp(32, (b"\3\2\1\0" * 8 + b"\6\5\4\0" * 8) * 16), (1, 2, 3), (4, 5, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", BMPS)
def test_a_bmp_has_the_values_of_its_samples(name: str) -> None:
    data, *expected = BMPS[name]
    assert colors(data) == tuple(expected)
