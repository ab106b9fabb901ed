"""AVIF and HEIC files, built box by box: grids of tiles, rotation and mirroring, sizes that lie."""

import io
import struct
from collections.abc import Sequence
from functools import cache

from PIL import Image
from pillow_heif import register_heif_opener

from model.images.isobmff import boxes

_CODINGS = {"AVIF": (b"av01", b"av1C"), "HEIC": (b"hvc1", b"hvcC")}
_BRANDS = {"AVIF": b"avif", "HEIC": b"heic"}


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def rotated(quarters: int) -> bytes:
    """Return the property of an anticlockwise rotation."""
    return box(b"irot", bytes([quarters]))


def mirrored(axis: int) -> bytes:
    """Return the property that exchanges top and bottom (axis 0), or left and right (1)."""
    return box(b"imir", bytes([axis]))


@cache
def encode_heic() -> None:
    """Have Pillow write HEIC files, as the format HEIF."""
    register_heif_opener()


def picture_file(
    kind: str,
    tiles: Sequence[Image.Image],
    *,
    num_columns: int | None = None,
    size: tuple[int, int] | None = None,
    properties: Sequence[bytes] = (),
    exif: bytes = b"",
) -> bytes:
    """Build an AVIF or HEIC of one picture, or of equally large tiles in a grid if it has columns.

    size: that the picture claims, unless it is that of its tiles. properties: further ones, in their order.
    """
    encode_heic()
    codings = [_coded(kind, tile) for tile in tiles]
    (width, height), num_rows = tiles[0].size, len(tiles) // (num_columns or 1)
    whole = size or (width * (num_columns or 1), height * (num_rows if num_columns else 1))
    coding = _CODINGS[kind][0]
    items = [(coding, content) for _, content in codings]
    own = [codings[0][0], *properties]
    essential = [0x80 | (3 + index) for index in range(len(own))]
    associations = [[1, *essential]]
    if num_columns:
        grid = struct.pack(">4B2H", 0, 0, num_rows - 1, num_columns - 1, *whole)
        items = [(b"grid", grid), *items]
        associations = [[1, *essential[1:]], *([[2, essential[0]]] * len(tiles))]
    if exif:
        items.append((b"Exif", bytes(4) + exif.removeprefix(b"Exif\0\0")))
    all_properties = b"".join([_ispe(*whole), _ispe(width, height), *own])
    references = (
        struct.pack(f">2H{len(tiles)}H", 1, len(tiles), *range(2, 2 + len(tiles))) if num_columns else b""
    )
    parts = [
        box(b"hdlr", bytes(8) + b"pict" + bytes(13)),
        box(b"pitm", bytes(4) + struct.pack(">H", 1)),
        _iinf([name for name, _ in items]),
        box(b"iref", bytes(4) + (box(b"dimg", references) if references else b"") + _describes(exif, items)),
        box(b"iprp", box(b"ipco", all_properties) + _ipma(associations)),
    ]
    start = box(b"ftyp", _BRANDS[kind] + bytes(4) + _BRANDS[kind] + b"mif1miaf")
    grids = [content for name, content in items if name == b"grid"]
    contents = [content for name, content in items if name != b"grid"]
    parts += [box(b"idat", grid) for grid in grids]  # as phones do
    num_before = len(start) + 12 + sum(map(len, parts)) + len(_iloc(grids, contents, 0)) + 8
    meta = box(b"meta", bytes(4) + b"".join(parts) + _iloc(grids, contents, num_before))
    return start + meta + box(b"mdat", b"".join(contents))


def _coded(kind: str, image: Image.Image) -> tuple[bytes, bytes]:
    """Return the property with the configuration of the decoder, and the coded picture."""
    buffer = io.BytesIO()
    image.save(buffer, {"HEIC": "HEIF"}.get(kind, kind), quality=95)
    data = buffer.getvalue()
    found = {name: data[place:end] for name, place, end in boxes(data, 0, len(data))}
    name = _CODINGS[kind][1]
    place = data.index(name) - 4
    return data[place : place + int.from_bytes(data[place : place + 4])], found[b"mdat"]


def _ispe(width: int, height: int) -> bytes:
    return box(b"ispe", bytes(4) + struct.pack(">2I", width, height))


def _iinf(names: Sequence[bytes]) -> bytes:
    entries = [
        box(b"infe", b"\2\0\0\0" + struct.pack(">2H4s", number, 0, name) + b"\0")
        for number, name in enumerate(names, 1)
    ]
    return box(b"iinf", bytes(4) + struct.pack(">H", len(names)) + b"".join(entries))


def _describes(exif: bytes, items: Sequence[object]) -> bytes:
    return box(b"cdsc", struct.pack(">3H", len(items), 1, 1)) if exif else b""


def _ipma(associations: Sequence[Sequence[int]]) -> bytes:
    entries = [
        struct.pack(f">HB{len(numbers)}B", item, len(numbers), *numbers)
        for item, numbers in enumerate(associations, 1)
    ]
    return box(b"ipma", bytes(4) + struct.pack(">I", len(associations)) + b"".join(entries))


def _iloc(grids: Sequence[bytes], contents: Sequence[bytes], start: int) -> bytes:
    """Return where items are: grids in the box `idat`, contents in the file, one behind the other."""
    entries = [struct.pack(">4H2I", 1, 1, 0, 1, 0, len(grid)) for grid in grids]
    for number, content in enumerate(contents, 1 + len(grids)):
        entries.append(struct.pack(">4H2I", number, 0, 0, 1, start, len(content)))
        start += len(content)
    return box(b"iloc", b"\1\0\0\0\x44\0" + struct.pack(">H", len(entries)) + b"".join(entries))
