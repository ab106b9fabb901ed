"""Limits of the process that decodes, each in a process of its own."""

import io
import signal
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from model.images.decoding import decode_image
from model.images.header import memory_of, read_header
from tests.image_files import encode, jpeg_of_scans, noise, png, png_chunk
from tests.isobmff_files import encode_heic, picture_file

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux'")

PROGRAM = """
import sys
from model.images.limits import decode_within_limits
from model.errors import InvalidImageFileError
data, (max_bytes, max_cpu_ms) = sys.stdin.buffer.read(), map(int, sys.argv[1:])
for _ in range(2):
    try:
        limits = dict(max_pixels=10**8, max_bytes=max_bytes, max_cpu_s=max_cpu_ms / 1000)
        pixels = decode_within_limits(data, 32, **limits)
        print(len(pixels), sum(pixels))
    except InvalidImageFileError as exc:
        print(exc)
kept = bytearray(2**28)  # the limits ended with the calls
"""


def run(data: bytes, *, max_bytes: int = 2**28, max_cpu_ms: int = 5000) -> tuple[int, list[str]]:
    """Decode twice; return the exit code and what was printed."""
    command = [sys.executable, "-c", PROGRAM, str(max_bytes), str(max_cpu_ms)]
    done = subprocess.run(command, input=data, capture_output=True, check=False, timeout=60)
    return done.returncode, done.stdout.decode().splitlines()


def test_within_the_limits_the_pixels_are_the_same() -> None:
    data = encode(noise(100, 100), "JPEG")
    expected = decode_image(data, 32).tobytes()
    assert run(data) == (0, [f"3072 {sum(expected)}"] * 2)


def stripes(width: int, height: int, mode: str) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert(mode)


def deep_heic(mode: str) -> bytes:
    """Encode 10 bits, of full colour."""
    encode_heic()
    levels = np.full((1500, 2000, len(mode.partition(";")[0])), 30_000, np.uint16)
    buffer = io.BytesIO()
    pillow_heif.from_bytes(mode, (2000, 1500), levels.tobytes()).save(buffer, quality=50, chroma=444)
    return buffer.getvalue()


def transparent_png() -> bytes:
    rows = [bytes(6 * 2000)] * 1500
    return png(2000, 1500, rows, depth=16, before=png_chunk(b"tRNS", bytes([0, 1] * 3)))


TILES = [Image.new("RGB", (512, 512), (9 * index, 99, 200)) for index in range(12)]
LARGEST: dict[str, Callable[[], bytes]] = {
    "AVIF": lambda: encode(stripes(2000, 1500, "RGBA"), "AVIF", subsampling="4:4:4", speed=10),
    "AVIF in a grid": lambda: picture_file("AVIF", TILES, num_columns=4, size=(2000, 1500)),
    "HEIC": lambda: deep_heic("RGB;16"),
    "HEIC with alpha": lambda: deep_heic("RGBA;16"),
    "HEIC in a grid": lambda: picture_file("HEIC", TILES, num_columns=4, size=(2000, 1500)),
    "JPEG 2000 of one tile": lambda: encode(stripes(2000, 1500, "RGBA"), "JPEG2000"),
    "JPEG 2000 of small tiles": lambda: encode(stripes(2000, 1500, "RGB"), "JPEG2000", tile_size=(20, 20)),
    "PNG with a transparent colour of 16 bits": transparent_png,
}


@pytest.mark.parametrize("name", LARGEST)
def test_the_memory_computed_from_the_header_is_enough(name: str) -> None:
    data = LARGEST[name]()
    max_bytes = memory_of(read_header(data), 32, len(data))
    assert run(data, max_bytes=max_bytes) == (0, [f"3072 {sum(decode_image(data, 32).tobytes())}"] * 2)


@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
def test_a_frame_larger_than_its_header_says_is_refused_or_fits(kind: str) -> None:
    data = picture_file(kind, [Image.new("RGB", (4000, 4000))], size=(64, 64))
    max_bytes = memory_of(read_header(data), 32, len(data))
    assert max_bytes < 32 * 2**20
    code, lines = run(data, max_bytes=max_bytes)
    assert code == 0
    assert len(lines) == 2
    assert all(" is damaged" in line or "takes more than" in line for line in lines), lines


def test_beyond_its_memory_a_file_is_refused_and_the_process_goes_on() -> None:
    data = encode(Image.new("RGB", (4000, 3000)), "PNG")  # 48 MB
    assert run(data, max_bytes=80 * 2**20)[1] == ["3072 0"] * 2
    code, lines = run(data, max_bytes=40 * 2**20)
    assert code == 0
    assert len(lines) == 2
    assert all("takes more than 41943040 bytes; save it again" in line for line in lines)


def test_beyond_its_time_the_process_dies() -> None:
    data = jpeg_of_scans(100, (3000, 2000))
    assert run(data, max_cpu_ms=100) == (-signal.SIGPROF, [])
