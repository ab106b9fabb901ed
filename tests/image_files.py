"""Image files for tests: one of each type that is read, and the parts from which hostile ones are built."""

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from tests.isobmff_files import picture_file

PNG_START = b"\x89PNG\r\n\x1a\n"


def noise(width: int, height: int, *, seed: int = 0, channels: int = 3) -> Image.Image:
    """Return noise of a few colours, which compresses a little."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 8, (height, width, channels), dtype=np.uint8) * 36
    return Image.fromarray(pixels, {3: "RGB", 4: "RGBA"}[channels])


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(
    width: int,
    height: int,
    rows: Sequence[bytes],
    *,
    depth: int = 8,
    color_type: int = 2,
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """Build a PNG of unfiltered rows. before, after: further chunks, on either side of the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = (
        png_chunk(b"IHDR", header) + before + png_chunk(b"IDAT", pixels) + after + png_chunk(b"IEND", b"")
    )
    return PNG_START + chunks


def png_of_zeros(width: int, height: int, *, depth: int = 8, color_type: int = 0) -> bytes:
    """Build a black PNG of any size in a few kilobytes."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color_type]
    row = bytes(1 + (width * depth * channels + 7) // 8)
    compressor = zlib.compressobj(9)
    rows_at_once = max(1, 2**20 // len(row))
    parts = [
        compressor.compress(row * min(rows_at_once, height - top)) for top in range(0, height, rows_at_once)
    ]
    pixels = b"".join([*parts, compressor.flush()])
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    return PNG_START + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


def tiff(
    content: bytes,
    width: int,
    height: int,
    *,
    depth: int = 8,
    photometric: int = 1,
    tags: Sequence[tuple[int, int, int, bytes]] = (),
    without: Sequence[int] = (),
) -> bytes:
    """Build a little-endian TIFF of one strip. tags: further ones, or others of the same number.

    A tag is number, type, count, and the four bytes of its value or of the place where it is.
    """
    content += bytes(len(content) % 2)
    standard = [
        (256, 4, 1, struct.pack("<I", width)),
        (257, 4, 1, struct.pack("<I", height)),
        (258, 3, 1, struct.pack("<HH", depth, 0)),
        (259, 3, 1, struct.pack("<HH", 1, 0)),
        (262, 3, 1, struct.pack("<HH", photometric, 0)),
        (273, 4, 1, struct.pack("<I", 8)),
        (277, 3, 1, struct.pack("<HH", 1, 0)),
        (278, 4, 1, struct.pack("<I", height)),
        (279, 4, 1, struct.pack("<I", len(content))),
    ]
    by_number = {tag[0]: tag for tag in [*standard, *tags] if tag[0] not in without}
    entries = sorted(by_number.values())
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + directory + bytes(4)


def tiled_tiff(image: Image.Image, tile: int = 32) -> bytes:
    """Build a deflated grey TIFF of square tiles."""
    levels = np.asarray(image.convert("L"))
    height, width = levels.shape
    padded = np.pad(levels, ((0, -height % tile), (0, -width % tile)))
    tiles = [
        zlib.compress(padded[top : top + tile, left : left + tile].tobytes())
        for top in range(0, height, tile)
        for left in range(0, width, tile)
    ]
    ends = np.cumsum([len(one) for one in tiles])
    first = 8 + 8 * len(tiles)
    offsets = struct.pack(f"<{len(tiles)}I", first, *(first + int(end) for end in ends[:-1]))
    counts = struct.pack(f"<{len(tiles)}I", *(len(one) for one in tiles))
    tags = [
        (259, 3, 1, struct.pack("<HH", 8, 0)),
        (322, 4, 1, struct.pack("<I", tile)),
        (323, 4, 1, struct.pack("<I", tile)),
        (324, 4, len(tiles), struct.pack("<I", 8)),
        (325, 4, len(tiles), struct.pack("<I", 8 + 4 * len(tiles))),
    ]
    without = (273, 278, 279)  # a file of tiles has no strips
    return tiff(offsets + counts + b"".join(tiles), width, height, tags=tags, without=without)


def interlaced_palette_png(image: Image.Image) -> bytes:
    """Build a palette PNG in the seven passes of Adam7."""
    indexed = image.convert("P", palette=Image.Palette.ADAPTIVE)
    indices, palette = np.asarray(indexed), bytes(indexed.getpalette() or ())
    passes = [
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ]
    rows = b"".join(
        b"\0" + row.tobytes()
        for top, left, down, right in passes
        for row in indices[top::down, left::right]
        if row.size
    )
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, 3, 0, 0, 1)
    chunks = [(b"IHDR", header), (b"PLTE", palette), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return PNG_START + b"".join(png_chunk(kind, content) for kind, content in chunks)


def jpeg_of_scans(num_scans: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """Build a progressive JPEG of one colour whose last scan is repeated until there are so many.

    Each costs 0.2 ms of CPU time for 10,000 pixels, and next to no bytes.
    """
    data = encode(Image.new("RGB", size, (200, 30, 60)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    end = data.rindex(b"\xff\xd9")
    return data[:last] + data[last:end] * (num_scans - data.count(b"\xff\xda") + 1) + data[end:]


def bmp_of_short_rows(width: int, height: int) -> bytes:
    """Build a run-length BMP whose rows end after one pixel; 0.1 s of CPU time for each million of pixels."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 2, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 62) + header + bytes(8) + b"\1\1\0\0" * height


def one_of_each_type(width: int = 64, height: int = 48) -> dict[str, bytes]:
    """Build the same picture in each type of file that is read; another one where tiles make a grid.

    height: at most 64 px.
    """
    rgb, rgba = noise(width, height), noise(width, height, channels=4)
    frames = [noise(width, height, seed=seed) for seed in (1, 2)]
    num_columns = -(-width // 64)
    tiles = [noise(64, 64, seed=seed) for seed in range(num_columns)]
    levels = (np.asarray(rgb.convert("L")).astype(np.uint16) * 257).astype(">u2")
    return {
        "jpeg": encode(rgb, "JPEG", quality=60),
        "progressive jpeg": encode(rgb, "JPEG", quality=60, progressive=True),
        "cmyk jpeg": encode(rgb.convert("CMYK"), "JPEG", quality=60),
        "png": encode(rgb, "PNG"),
        "16-bit png": png(width, height, [row.tobytes() for row in levels], depth=16, color_type=0),
        "interlaced palette png": interlaced_palette_png(rgb),
        "palette png": encode(rgb.convert("P"), "PNG", transparency=0),
        "rgba png": encode(rgba, "PNG"),
        "animated png": encode(rgb, "PNG", save_all=True, append_images=frames),
        "animated gif": encode(rgb, "GIF", save_all=True, append_images=frames, disposal=2),
        "webp": encode(rgb, "WEBP", quality=50),
        "lossless webp": encode(rgba, "WEBP", lossless=True),
        "animated webp": encode(rgb, "WEBP", save_all=True, append_images=frames),
        "tiff in strips": encode(rgb, "TIFF"),
        "lzw tiff": encode(rgb, "TIFF", compression="tiff_lzw"),
        "tiled tiff": tiled_tiff(rgb),
        "jpeg tiff": encode(rgb, "TIFF", compression="jpeg"),
        "bmp": encode(rgb, "BMP"),
        "mpo": encode(rgb, "MPO", save_all=True, append_images=frames),
        "avif": encode(rgb, "AVIF", quality=60),
        "transparent avif": encode(rgba, "AVIF", quality=60),
        "animated avif": encode(rgb, "AVIF", save_all=True, append_images=frames),
        "avif in a grid": picture_file("AVIF", tiles, num_columns=num_columns, size=(width, height)),
        "heic in a grid": picture_file("HEIC", tiles, num_columns=num_columns, size=(width, height)),
        "jpeg 2000": encode(rgba, "JPEG2000"),
        "lossy jpeg 2000": encode(rgb, "JPEG2000", irreversible=True, quality_layers=[20]),
        "codestream of jpeg 2000": encode(rgb, "JPEG2000", no_jp2=True, tile_size=(32, 32)),
    }
