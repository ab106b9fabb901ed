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
