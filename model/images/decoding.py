"""Decodes an image file into the square of pixels that a vision encoder reads."""

import contextlib
import hashlib
import io
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Final

from PIL import ExifTags, Image, ImageChops, ImageFile, UnidentifiedImageError, _webp

from model.errors import InvalidImageFileError
from model.images import isobmff, png
from model.images.header import SIGNATURES, ImageHeader, check_size, damaged_header, read_header
from model.images.jpeg import ends_for, has_all_scans, lacks_end, without_fill
from model.images.resize import BAND_PX, resize_to_square
from model.images.tiff import unread_tiff

# What Pillow's readers raise on damaged files.
DAMAGE: Final = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError,
    AttributeError, RuntimeError, struct.error, zlib.error,
)  # fmt: skip
MAX_PIXELS: Final = 178_956_970  # unless told otherwise: what Pillow itself refuses
_MAX_ECHOED: Final = 60
_WITHOUT_METADATA: Final = {
    "PNG": png.without_metadata,
    "AVIF": isobmff.without_metadata,
    "HEIC": isobmff.without_metadata,
}


def decode_image(data: bytes, side: int, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the first frame of a file: upright, RGB on white, resized to [side, side].

    A JPEG without its end marker is read if no pixels are missing: then it has all scans, and no pixel
    depends on what follows the last byte. Raises as `open_image`.
    """
    if data.startswith(SIGNATURES["JPEG"]) and lacks_end(data):
        data = _end_jpeg(data, max_pixels)
    with open_image(data, max_pixels=max_pixels) as (image, header):
        _resolve_transparency(image, header, data)
        return resize_to_square(image, side, orientation=_orientation(image), levels=_levels(image, header))


@contextlib.contextmanager
def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Iterator[tuple[Image.Image, ImageHeader]]:
    """Load the first frame of a file, as it is stored.

    Raises UnknownImageFormatError; InvalidImageFileError for a damaged file, for one beyond the limits, and
    for samples that are not read; MemoryError where the process may not allocate enough.
    """
    header = read_header(data)
    check_size(header.width, header.height, max_pixels)
    # Pillow's own limit is process-wide, and only warns up to twice its value; here it is checked always.
    Image.MAX_IMAGE_PIXELS = None
    try:
        with _open(data, header) as image:
            check_size(*image.size, max_pixels)  # a frame of a GIF may be larger than its header says
            image.load()
            yield image, header
    except UnidentifiedImageError as exc:
        refusal = unread_tiff(data) if header.format == "TIFF" else damaged_header(header.format)
        raise refusal from exc
    except DAMAGE as exc:
        reason = str(exc)[:_MAX_ECHOED]
        raise InvalidImageFileError(
            f"the {header.format} is damaged, or of a kind that is not read ({reason}); "
            "send the file whole, or save it again as PNG or JPEG"
        ) from exc


def _open(data: bytes, header: ImageHeader) -> Image.Image:
    if header.format == "WEBP":
        return _open_webp(data, header)
    prepare_decoder(header.format)
    if header.format in _WITHOUT_METADATA:
        data = _WITHOUT_METADATA[header.format](data)
    name = "HEIF" if header.format == "HEIC" else header.format  # in Pillow
    return Image.open(io.BytesIO(data), formats=(name,))


@cache
def _prepare_tiff() -> None:
    """Have Pillow read by libtiff, and grey of 12 and 16 bits in either byte order, black or white as zero.

    Its own reader, of uncompressed files, takes planes of 16 bits for planes of 8, and sampled colours for
    whole ones.
    """
    from PIL import TiffImagePlugin as Plugin

    Plugin.READ_LIBTIFF = True
    for prefix, mode in ((Plugin.II, "I;16"), (Plugin.MM, "I;16B")):
        for photometric in (0, 1):
            key = (prefix, photometric, (1,), 1)
            Plugin.OPEN_INFO.setdefault((*key, (16,), ()), (mode, mode))
            Plugin.OPEN_INFO.setdefault((*key, (12,), ()), ("I;16", "I;12"))


@cache
def _prepare_avif() -> None:
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1


@cache
def _prepare_heic() -> None:
    from pillow_heif import register_heif_opener

    register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)


@cache
def _prepare_jpeg2000() -> None:
    from PIL import Jpeg2KImagePlugin  # noqa: F401, registers itself


_PREPARATIONS: Final[dict[str, Callable[[], None]]] = {
    "TIFF": _prepare_tiff,
    "JPEG2000": _prepare_jpeg2000,
    "AVIF": _prepare_avif,
    "HEIC": _prepare_heic,
}


def prepare_decoder(name: str) -> None:
    """Load the decoder of a format, where Pillow does not do so itself. Once is enough."""
    if name in _PREPARATIONS:
        _PREPARATIONS[name]()


def _open_webp(data: bytes, header: ImageHeader) -> Image.Image:
    """Decode the first frame of a WebP file, with a third less memory than `Image.open` and `load` take."""
    decoder = _webp.WebPAnimDecoder(data)
    pixels, _ = decoder.get_next()
    mode = decoder.get_info()[-1]
    metadata = {"exif": decoder.get_chunk("EXIF"), "xmp": decoder.get_chunk("XMP ")}
    del decoder  # and its two canvases
    if len(pixels) != 4 * header.width * header.height:
        raise ValueError("its frames have another size than its header says")
    image = Image.frombuffer(mode, (header.width, header.height), pixels, "raw", mode, 0, 1)
    image.info.update({key: content for key, content in metadata.items() if content})
    return image


def _end_jpeg(data: bytes, max_pixels: int) -> bytes:
    """Return a file with an end, or raise InvalidImageFileError where some pixels depend on what it is."""
    data = without_fill(data)
    ends = ends_for(data)
    with contextlib.suppress(struct.error, LookupError):  # the header ends, too
        if has_all_scans(data) and len({_hash_pixels(data + end, max_pixels) for end in ends}) == 1:
            return data + ends[0]
    raise InvalidImageFileError(
        "the image is damaged (the JPEG ends before its last pixels); send the file whole"
    )


def _hash_pixels(data: bytes, max_pixels: int) -> bytes:
    digest = hashlib.sha256()
    with open_image(data, max_pixels=max_pixels) as (image, _):
        num_rows = max(1, BAND_PX // image.width)
        for top in range(0, image.height, num_rows):
            digest.update(image.crop((0, top, image.width, min(top + num_rows, image.height))).tobytes())
    return digest.digest()


def _orientation(image: Image.Image) -> int:
    """Return the orientation in the metadata; 1 where they are damaged, for the pixels are still good."""
    with contextlib.suppress(*DAMAGE):
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _resolve_transparency(image: Image.Image, header: ImageHeader, data: bytes) -> None:
    """Bring the transparent colour of a PNG, which has the depth of the file, to the depth of the pixels."""
    color = image.info.get("transparency")
    if image.mode == "L" and header.depth < 8 and isinstance(color, int):
        image.info["transparency"] = color * 255 // (2**header.depth - 1)
    if image.mode == "RGB" and header.depth == 16 and isinstance(color, tuple):
        del image.info["transparency"]
        image.putalpha(_opaque_pixels(image, header, data, color))


def _opaque_pixels(
    image: Image.Image, header: ImageHeader, data: bytes, transparent: tuple[int, ...]
) -> Image.Image:
    """Return 255 where a pixel of 16 bits a sample differs from a colour. image: its upper bytes."""
    with _open(data, header) as lower:
        assert isinstance(lower, ImageFile.ImageFile)
        lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]
        lower.load()
    opaque = Image.new("L", image.size)
    for samples, shift in ((image, 8), (lower, 0)):
        for channel, level in enumerate(transparent):
            differs = [255] * 256
            differs[level >> shift & 255] = 0
            opaque = ImageChops.lighter(opaque, samples.getchannel(channel).point(differs))
    return opaque


def _levels(image: Image.Image, header: ImageHeader) -> Sequence[int] | None:
    """Return the 8-bit level of each of 65,536, where the samples have more than 8 bits; else None."""
    if not image.mode.startswith("I;16"):
        return None
    levels = [min(255, level >> (header.depth - 8)) for level in range(2**16)]
    if header.is_white_zero:
        levels = [255 - level for level in levels]
    transparent = image.info.pop("transparency", None)
    if transparent is not None:
        levels[transparent] = 255
    return levels
