"""The decoder: what it takes, what it refuses and why, and that the pixels are upright."""

import asyncio
import base64
import io
import os
import random
import struct
import time
import zlib
from collections.abc import Callable
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.process_memory import descendants
from model.images.decoding import decode_image
from model.images.resize import resize_to_square
from service.errors import ImageTooLargeError, InvalidImageError, ServiceError, UnsupportedImageError
from service.image_decoding import ByteBudget, ImageDecoder
from tests.image_files import bmp_of_short_rows
from tests.service.fakes import png

SIZE = 16


def expected_pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(resize_to_square(image, SIZE)))


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width: int = 20, height: int = 12, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few dozen bytes whose header claims a size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.fixture
def decoder() -> ImageDecoder:
    return ImageDecoder(
        max_bytes=100_000,
        max_pixels=40_000_000,
        num_processes=1,
        max_decode_bytes=528 * 2**20,
        max_cpu_s=10.0,
    )


async def pixels_of(decoder: ImageDecoder, source: str | bytes) -> Tensor:
    return await decoder.decode_pixels(await decoder.read(source), SIZE)


async def status_of(decoder: ImageDecoder, source: bytes) -> int:
    try:
        await pixels_of(decoder, source)
    except ServiceError as refused:
        return refused.status
    return 200


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"])
async def test_each_promised_format_is_read(decoder: ImageDecoder, kind: str) -> None:
    assert (await pixels_of(decoder, encode(photo(), kind))).shape == (SIZE, SIZE, 3)


async def test_base64_data_uri_and_bytes_are_the_same_file(decoder: ImageDecoder) -> None:
    data = encode(photo())
    text = base64.b64encode(data).decode()
    files = [await decoder.read(source) for source in (data, text, f"data:image/png;base64,{text}")]
    assert {file.digest for file in files} == {files[0].digest}
    assert all(file.data == data for file in files)


async def test_the_pixels_are_those_of_the_preprocessor(decoder: ImageDecoder) -> None:
    assert torch.equal(await pixels_of(decoder, encode(photo())), expected_pixels(photo()))


@pytest.mark.parametrize("orientation", range(1, 9))
async def test_the_orientation_in_exif_is_applied(decoder: ImageDecoder, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = photo() if orientation == 1 else photo().transpose(undo[orientation])
    assert torch.equal(
        await pixels_of(decoder, encode(stored, exif=exif)), await pixels_of(decoder, encode(photo()))
    )


async def test_damaged_exif_costs_the_orientation_only(decoder: ImageDecoder) -> None:
    data = encode(photo(), exif=b"Exif\0\0 this is no TIFF header")
    assert torch.equal(await pixels_of(decoder, data), await pixels_of(decoder, encode(photo())))


async def test_the_first_frame_of_an_animation_is_taken(decoder: ImageDecoder) -> None:
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    animated = encode(red, "GIF", save_all=True, append_images=[blue])
    assert torch.equal(await pixels_of(decoder, animated), expected_pixels(red))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_mode_becomes_pixels(mode: str) -> None:
    kind = "TIFF" if mode in ("CMYK", "YCbCr", "PA", "HSV") else "PNG"
    image = photo().convert("RGB").convert(mode if mode not in ("PA", "HSV") else "RGB")
    assert decode_image(encode(image, kind), SIZE).size == (SIZE, SIZE)


async def test_16_bit_grey_is_scaled_not_clipped(decoder: ImageDecoder) -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    deep, flat = Image.fromarray(levels * 256), Image.fromarray(levels.astype(np.uint8))
    assert torch.equal(await pixels_of(decoder, encode(deep)), await pixels_of(decoder, encode(flat)))


async def test_32_bit_samples_are_refused_with_a_cure(decoder: ImageDecoder) -> None:
    floats = Image.fromarray(np.zeros((4, 4), dtype=np.float32))
    with pytest.raises(InvalidImageError, match="convert it to 8 bits"):
        await pixels_of(decoder, encode(floats, "TIFF"))


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
async def test_odd_shapes_are_taken(decoder: ImageDecoder, size: tuple[int, int]) -> None:
    assert (await pixels_of(decoder, encode(Image.new("RGB", size)))).shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize(
    ("width", "height", "shown"), [(10_000, 10_000, "100 Mpx"), (60_000, 60_000, "3600 Mpx")]
)
async def test_a_bomb_is_refused_by_its_header(
    decoder: ImageDecoder, width: int, height: int, shown: str
) -> None:
    with pytest.raises(InvalidImageError, match=rf"{shown}, the limit is 40 Mpx; downscale it first"):
        await pixels_of(decoder, bomb(width, height))


async def test_an_image_of_exactly_the_limit_is_let_in(decoder: ImageDecoder) -> None:
    assert await status_of(decoder, encode(Image.new("1", (8_000, 5_000)))) == 200
    with pytest.raises(InvalidImageError, match=r"is 8000 x 5001 = 40\.01 Mpx, the limit is 40 Mpx"):
        await pixels_of(decoder, bomb(8_000, 5_001))


async def test_a_file_over_the_byte_limit_is_refused_in_any_wrapping(decoder: ImageDecoder) -> None:
    data = bytes(100_001)
    wrapped = base64.encodebytes(data).decode()
    for source in (data, base64.b64encode(data).decode(), wrapped, "data:;base64," + wrapped):
        with pytest.raises(ImageTooLargeError, match=r"100001 bytes, the limit is 100000; compress"):
            await decoder.read(source)
    fitting = encode(photo()).ljust(100_000, b"\0")
    assert (await decoder.read(base64.encodebytes(fitting).decode())).data == fitting


@pytest.mark.parametrize(
    "data",
    [
        b"hello, this is text",
        b"BMW is a make of cars, not a bitmap",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"<html></html>",
        b"RIFF\x10\0\0\0WAVEfmt ",
        b"%PDF-1.7",
        b"\0\0\0\x18ftypmp42\0\0\0\0",
        b"\0\0\0\x18ftypmif1\0\0\0\0mif1miaf",
    ],
)
async def test_what_is_no_image_is_an_unsupported_format(decoder: ImageDecoder, data: bytes) -> None:
    with pytest.raises(UnsupportedImageError, match="none of JPEG, PNG, WEBP, GIF, TIFF, BMP"):
        await decoder.read(data)


async def test_an_empty_file_is_said_to_be_empty(decoder: ImageDecoder) -> None:
    for source in (b"", "", "data:image/png;base64,"):
        with pytest.raises(InvalidImageError, match="empty"):
            await decoder.read(source)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
async def test_a_truncated_file_is_refused(decoder: ImageDecoder, kind: str, part: float) -> None:
    data = encode(photo(60, 60), kind)
    with pytest.raises(InvalidImageError, match=r"whole|empty"):
        await pixels_of(decoder, data[: int(len(data) * part)])


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, about what it mended in a TIFF
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"])
async def test_damaged_files_are_answered_or_refused_never_a_crash(decoder: ImageDecoder, kind: str) -> None:
    whole = encode(photo(30, 30), kind)
    chance = random.Random(0)
    for _ in range(120):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 20)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        assert await status_of(decoder, bytes(damaged)) in (200, 415, 422)


# 0xFBFF is "+/" in the standard alphabet; a file of 51 bytes needs no padding, of 49 two characters.
ODD_FILES = [encode(photo(2, 2)) + b"\xfb\xff" * 30 + bytes(number) for number in range(3)]
WRAPPINGS: dict[str, Callable[[bytes], bytes]] = {
    "standard": base64.b64encode,
    "url-safe": base64.urlsafe_b64encode,
    "unpadded": lambda data: base64.b64encode(data).rstrip(b"="),
    "url-safe, unpadded": lambda data: base64.urlsafe_b64encode(data).rstrip(b"="),
    "lines of 76": base64.encodebytes,
    "lines of CR and LF": lambda data: base64.encodebytes(data).replace(b"\n", b"\r\n"),
    "unpadded lines": lambda data: base64.encodebytes(data).replace(b"=", b""),
    "spaces around": lambda data: b" \t\n" + base64.b64encode(data) + b" \n",
    "lines inside of the padding": lambda data: base64.b64encode(data).replace(b"=", b"\n="),
}
DATA_URIS = [
    "data:image/png;base64,",
    "DATA:IMAGE/PNG;BASE64,",
    "data:;base64,",
    "data:application/octet-stream;base64,",
    "data:image/svg+xml;charset=utf-8;base64,",
    "data:image/png;name=a.png;base64,",
    "data:image/png;name=my%20photo.png;base64,",
    "data:image/png;name=IMG(1).png;base64,",
    "data:image/png;name=it's.png;base64,",
    'data:image/png;name="a, b;c.png";base64,',
    "data:image/png;name=été.png;charset=utf-8;base64,",
    "data:image/png; name=a.png; base64, ",
    "\n data:image/png;base64,\n",
]


@pytest.mark.parametrize("prefix", ["", *DATA_URIS])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
async def test_base64_of_any_kind_is_the_same_file(decoder: ImageDecoder, wrapping: str, prefix: str) -> None:
    for data in ODD_FILES:
        file = await decoder.read(prefix + WRAPPINGS[wrapping](data).decode())
        assert file.data == data


async def test_a_data_uri_may_be_percent_encoded(decoder: ImageDecoder) -> None:
    for data in ODD_FILES:
        text = quote(base64.b64encode(data), safe="")
        assert (await decoder.read("data:image/png;base64," + text)).data == data


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("!!!!", "not base64"),
        ("iVBORw0KGgo*", "use the standard or the url-safe alphabet"),
        ("iVBORw0KGgoAA", "cannot be 1 more than a multiple of 4"),
        ("iVBO=w0K", "not base64"),
        ("=", "not base64"),
        ("größe", "not base64"),
        ("data:image/png;base64,größe", "not base64"),
        ("data:image/png,%89PNG", "write it as data:image/png;base64"),
        ("data:image/png;base64;name=a", "write it as data:image/png;base64"),
        ("data:", "write it as data:image/png;base64"),
        ("https://example.org/cat.png", "URLs are not fetched"),
        ("HTTP://example.org/cat.png", "URLs are not fetched"),
        ("file:///home/cat.png", "URLs are not fetched"),
        ("blob:https://example.org/9f", "URLs are not fetched"),
    ],
)
async def test_bad_base64_is_informed_apart(decoder: ImageDecoder, source: str, message: str) -> None:
    with pytest.raises(InvalidImageError, match=message):
        await decoder.read(source)


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "\n"])
async def test_base64_whose_plus_became_a_space_is_named_as_such(decoder: ImageDecoder, prefix: str) -> None:
    for data in ODD_FILES:
        text = base64.b64encode(data + b"\xfb\xef").decode()
        assert text.count("+") > 9
        with pytest.raises(InvalidImageError, match=r"has spaces where a form has decoded its '\+'; write"):
            await decoder.read(prefix + text.replace("+", " "))


@pytest.mark.parametrize("encode_text", [base64.b64encode, base64.urlsafe_b64encode])
async def test_spaces_that_are_layout_are_left_out(
    decoder: ImageDecoder, encode_text: Callable[[bytes], bytes]
) -> None:
    for data in ODD_FILES:
        text = encode_text(data + b"\xfb\xef" * 9).decode()
        for layout in (" ", "\n  ", " \n", "\t"):
            pieces = [text[start : start + 64] for start in range(0, len(text), 64)]
            assert (await decoder.read(layout.join(pieces))).data == data + b"\xfb\xef" * 9


async def test_short_base64_without_a_plus_may_be_in_lines(decoder: ImageDecoder) -> None:
    data = next(data for shade in range(256) if b"+" not in base64.b64encode(data := png(shade)))
    text = base64.b64encode(data).decode()
    for width in (20, 64, 76):
        lines = [text[start : start + width] for start in range(0, len(text), width)]
        assert (await decoder.read(" ".join(lines))).data == data


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data:image/png", r"ends before its base64; write it as .* use --form-string, or send -F image=@"),
        ("DATA:", "ends before its base64"),
        ("cat.png", r"'cat\.png' is the name of a file, and not its bytes; .*-F image=@cat\.png"),
        ("@cat.png", "is the name of a file"),
        ("my cat, 1.JPEG", "is the name of a file"),
        ("größe.webp", "is the name of a file"),
        ("C:\\photos\\cat.png", "is the name of a file"),
        ("../photos/cat.tif", "is the name of a file"),
    ],
)
async def test_the_name_of_an_image_is_not_called_bad_base64(
    decoder: ImageDecoder, source: str, message: str
) -> None:
    with pytest.raises(InvalidImageError, match=message):
        await decoder.read(source)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000"])
async def test_a_file_of_base64_is_named_as_such(decoder: ImageDecoder, kind: str) -> None:
    data = encode(photo(30, 30), kind)
    files = [base64.b64encode(data), base64.encodebytes(data), base64.urlsafe_b64encode(data)]
    for file in (*files, b"\xef\xbb\xbf" + files[0], b"data:image/png;base64," + files[0]):
        with pytest.raises(UnsupportedImageError, match="is the base64 of an image; decode it first, or"):
            await decoder.read(file)
        with pytest.raises(UnsupportedImageError, match="is the base64 of an image"):
            await decoder.read(base64.b64encode(file).decode())


async def test_who_needs_many_bytes_is_not_passed_for_ever_and_a_cancelled_one_holds_none() -> None:
    budget, order = ByteBudget(100), []

    async def hold(name: str, num_bytes: int) -> None:
        async with budget.hold(num_bytes):
            order.append(name)
            await asyncio.sleep(0)

    async with budget.hold(60):
        waiting = [
            asyncio.create_task(hold(name, size)) for name, size in (("gone", 90), ("all", 100), ("one", 1))
        ]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
        assert order == []
    await asyncio.gather(*waiting, return_exceptions=True)
    assert order == ["all", "one"]


async def test_an_image_that_is_small_and_slow_is_decoded_as_a_large_one(decoder: ImageDecoder) -> None:
    slow = bmp_of_short_rows(2000, 2500)  # 5 MB, half a second and more
    assert (await pixels_of(decoder, slow)).shape == (SIZE, SIZE, 3)


async def test_cancelling_ends_the_decoding(decoder: ImageDecoder) -> None:
    file = await decoder.read(bmp_of_short_rows(8000, 4990))  # four seconds and more
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await decoder.decode_pixels(file, SIZE)
    assert time.monotonic() - started < 3
    assert (await pixels_of(decoder, encode(photo()))).shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize("seconds", [0.01, 0.03, 0.06])  # a process starts in a tenth of a second
async def test_cancelling_while_a_process_starts_leaves_none(decoder: ImageDecoder, seconds: float) -> None:
    before = set(descendants(os.getpid()))
    file = await decoder.read(encode(photo()))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(seconds):
            await decoder.decode_pixels(file, SIZE)
    assert set(descendants(os.getpid())) <= before
