"""Limits of the process that decodes, each in a process of its own."""

import signal
import subprocess
import sys

import pytest
from PIL import Image

from model.images.decoding import decode_image
from tests.image_files import encode, jpeg_of_scans, noise

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux'")

PROGRAM = """
import sys
from model.images import limits
from model.errors import InvalidImageFileError
data, (max_bytes, max_cpu_ms) = sys.stdin.buffer.read(), map(int, sys.argv[2:])
for _ in range(2):
    try:
        decode = getattr(limits, sys.argv[1])
        pixels = decode(data, 32, max_pixels=10**8, max_bytes=max_bytes, max_cpu_s=max_cpu_ms / 1000)
        print(len(pixels), sum(pixels))
    except InvalidImageFileError as exc:
        print(exc)
kept = bytearray(2**28)  # the limits ended with the calls
"""


def run(
    data: bytes, function: str, *, max_bytes: int = 2**28, max_cpu_ms: int = 5000
) -> tuple[int, list[str]]:
    """Decode twice; return the exit code and what was printed."""
    command = [sys.executable, "-c", PROGRAM, function, str(max_bytes), str(max_cpu_ms)]
    done = subprocess.run(command, input=data, capture_output=True, check=False, timeout=60)
    return done.returncode, done.stdout.decode().splitlines()


@pytest.mark.parametrize("function", ["decode_within_limits", "decode_in_background"])
def test_within_the_limits_the_pixels_are_the_same(function: str) -> None:
    data = encode(noise(100, 100), "JPEG")
    expected = decode_image(data, 32).tobytes()
    assert run(data, function) == (0, [f"3072 {sum(expected)}"] * 2)


@pytest.mark.parametrize("function", ["decode_within_limits", "decode_in_background"])
def test_beyond_its_memory_a_file_is_refused_and_the_process_goes_on(function: str) -> None:
    data = encode(Image.new("RGB", (4000, 3000)), "PNG")  # 48 MB
    assert run(data, function, max_bytes=80 * 2**20)[1] == ["3072 0"] * 2
    code, lines = run(data, function, max_bytes=40 * 2**20)
    assert code == 0
    assert len(lines) == 2
    assert all("takes more than 41943040 bytes; save it again" in line for line in lines)


@pytest.mark.parametrize("function", ["decode_within_limits", "decode_in_background"])
def test_beyond_its_time_the_process_dies(function: str) -> None:
    data = jpeg_of_scans(100, (3000, 2000))
    assert run(data, function, max_cpu_ms=100) == (-signal.SIGPROF, [])
