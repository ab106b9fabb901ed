"""JPEG files of several scans that are cut off: whole are those that hold all scans, and no others."""

import contextlib
import io
import re
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.errors import InvalidImageFileError
from model.images.decoding import decode_image
from tests.image_files import encode, noise

SIDE = 96


def photo() -> Image.Image:
    y, x = np.mgrid[0:72, 0:96]
    waves = [127 + 90 * np.sin(x / 9 + y / 17), 127 + 90 * np.cos(x / 13), 40 + 2 * y]
    return Image.blend(Image.fromarray(np.stack(waves, 2).astype(np.uint8)), noise(96, 72), 0.1)


def jpeg_of_components(*, restarts: bool = False) -> bytes:
    """Build a baseline JPEG with one scan for each component, from three grey ones."""
    options = {"restart_marker_blocks": 7} if restarts else {}
    greys = [encode(channel, "JPEG", **options) for channel in photo().convert("YCbCr").split()]
    frame_start, first_scan = greys[0].index(b"\xff\xc0"), greys[0].index(b"\xff\xda")
    components = b"".join(struct.pack("3B", number, 0x11, 0) for number in (1, 2, 3))
    header = struct.pack(">HHBHHB", 0xFFC0, 17, 8, 72, 96, 3) + components
    scans = [grey[grey.index(b"\xff\xda") : -2] for grey in greys]
    numbered = [scan[:5] + bytes([number]) + scan[6:] for number, scan in enumerate(scans, 1)]
    start = greys[0][:frame_start] + header + greys[0][frame_start + 13 : first_scan]
    return start + b"".join(numbered) + b"\xff\xd9"


THUMBNAIL = b"Exif\0\0" + encode(noise(16, 16), "JPEG", progressive=True)
MODES: dict[str, Image.Image] = {
    "colour": photo(),
    "grey": photo().convert("L"),
    "cmyk": Image.merge("CMYK", (*photo().split(), photo().convert("L"))),
    "flat": Image.new("RGB", (96, 72), (9, 99, 200)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "progressive": {},
    "full colour, best quality": {"quality": 100, "subsampling": 0},
    "restarts": {"restart_marker_blocks": 5},
    "thumbnail": {"exif": THUMBNAIL},
}
BASELINE: dict[str, dict[str, Any]] = {
    "baseline": {},
    "restarts": {"restart_marker_rows": 1},
    "optimised": {"optimize": True},
}
FILES = {
    f"{mode}, {kind}": encode(image, "JPEG", progressive=True, **options)
    for mode, image in MODES.items()
    for kind, options in OPTIONS.items()
} | {
    "scan of each component": jpeg_of_components(),
    "scan of each component, restarts": jpeg_of_components(restarts=True),
}


def scan_starts(data: bytes) -> list[int]:
    """Return where the scans of the picture begin, behind its thumbnail."""
    frame_start = max(data.rfind(b"\xff\xc0"), data.rfind(b"\xff\xc2"))
    return [match.start() for match in re.finditer(b"\xff\xda", data) if match.start() > frame_start]


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_all_scans_needs_no_end_marker(name: str) -> None:
    image = Image.open(io.BytesIO(FILES[name])).convert("RGB")
    expected = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    assert len(scan_starts(FILES[name])) > 2
    for end in (b"", b"\xff", b"\xff\xd9", bytes(100), b"\xff" * 100):
        found = np.asarray(decode_image(FILES[name][:-2] + end, SIDE))
        assert np.array_equal(found, expected), end


@pytest.mark.parametrize("fill", [b"", bytes(20_000), b"\xff" * 9], ids=["end", "zeros", "ones"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_at_a_scan_is_refused(name: str, fill: bytes) -> None:
    for start in scan_starts(FILES[name])[1:]:
        for end in (start, start + 1, start + 2, start + 5, start + 9):
            with pytest.raises(InvalidImageFileError, match="ends before its last pixels"):
                decode_image(FILES[name][:end] + fill, SIDE)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_inside_of_a_scan_is_refused(name: str) -> None:
    data = FILES[name]
    expected = np.asarray(decode_image(data, SIDE))
    first, last = scan_starts(data)[0], scan_starts(data)[-1]
    for end in (*range(first + 16, last, 1 + (last - first) // 9), *range(last + 16, len(data) - 2, 31)):
        with contextlib.suppress(InvalidImageFileError):
            assert np.array_equal(np.asarray(decode_image(data[:end], SIDE)), expected)
            # The last bits may be padding, and the last scan of one colour changes nothing.
            assert end >= len(data) - 7 or "flat" in name


@pytest.mark.parametrize("kind", BASELINE)
@pytest.mark.parametrize("mode", ["colour", "grey", "cmyk"])
def test_zeros_behind_a_cut_are_no_pixels(mode: str, kind: str) -> None:
    data = encode(MODES[mode], "JPEG", **BASELINE[kind])
    start = scan_starts(data)[0] + 14
    for end in range(start, len(data) - 20, (len(data) - start) // 5):
        with pytest.raises(InvalidImageFileError, match="ends before its last pixels"):
            decode_image(data[:end] + bytes(20_000), SIDE)
