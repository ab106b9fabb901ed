"""TIFF files of any kind, built tag by tag: byte order, BigTIFF, planes, depth, compression."""

import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

Tags = Mapping[int, tuple[int, Sequence[int]]]  # type (3: 16 bits, 4: 32 bits) and values by number

_FORMATS = {3: "H", 4: "I"}


def pack_samples(samples: np.ndarray, depth: int, order: str = "<") -> bytes:
    """Pack the rows of an array: 16 and 32 bits in a byte order, fewer bits side by side."""
    if depth in (8, 16, 32):
        return samples.astype(f"{order}u{depth // 8}").tobytes()
    rows = samples.reshape(len(samples), -1)
    bits = ((rows[..., None] >> np.arange(depth - 1, -1, -1)) & 1).astype(np.uint8)
    return np.packbits(bits.reshape(len(rows), -1), axis=1).tobytes()


def tiff_of(
    samples: np.ndarray,
    depth: int,
    photometric: int,
    *,
    order: str = "<",
    is_big: bool = False,
    in_planes: bool = False,
    is_deflated: bool = False,
    tags: Tags | None = None,
) -> bytes:
    """Build a TIFF of [H, W, C] samples. tags: further ones, or others of the same number."""
    height, width, channels = samples.shape
    planes = np.split(samples, channels, axis=2) if in_planes else [samples]
    strips = [pack_samples(plane, depth, order) for plane in planes]
    if is_deflated:
        strips = [zlib.compress(strip) for strip in strips]
    strips = [strip + bytes(len(strip) % 2) for strip in strips]
    start = 16 if is_big else 8
    offsets = [start + sum(map(len, strips[:index])) for index in range(len(strips))]
    all_tags: dict[int, tuple[int, Sequence[int]]] = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [depth] * channels),
        259: (3, [8 if is_deflated else 1]),
        262: (3, [photometric]),
        273: (4, offsets),
        277: (3, [channels]),
        278: (4, [height]),
        279: (4, [len(strip) for strip in strips]),
        284: (3, [2 if in_planes else 1]),
        **(tags or {}),
    }
    return _file(b"".join(strips), all_tags, order, is_big)


def _file(content: bytes, tags: Tags, order: str, is_big: bool) -> bytes:
    word, entry, count = ("Q", "HHQ", "Q") if is_big else ("I", "HHI", "H")
    values_at, values, entries = (16 if is_big else 8) + len(content), b"", []
    for number, (kind, numbers) in sorted(tags.items()):
        encoded = struct.pack(f"{order}{len(numbers)}{_FORMATS[kind]}", *numbers)
        if len(encoded) > struct.calcsize(word):
            values, encoded = (
                values + encoded + bytes(len(encoded) % 2),
                struct.pack(order + word, values_at + len(values)),
            )
        field = encoded.ljust(struct.calcsize(word), b"\0")
        entries.append(struct.pack(order + entry, number, kind, len(numbers)) + field)
    directory = struct.pack(order + count, len(entries)) + b"".join(entries) + bytes(8)
    head = struct.pack(order + "HHH", 43, 8, 0) if is_big else struct.pack(order + "H", 42)
    first = struct.pack(order + word, values_at + len(values))
    return {"<": b"II", ">": b"MM"}[order] + head + first + content + values + directory
