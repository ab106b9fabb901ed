"""Images that are sent as text: base64, or a data: URI. Errors name what was sent instead."""

import binascii
import re
from collections.abc import Callable
from typing import Final
from urllib.parse import unquote

from model.errors import ModelError
from model.images.header import sniff_format
from service.errors import InvalidImageError, UnsupportedImageError, echo_value

# Its parameters may be anything, such as a file name with commas: base64 itself has no semicolon.
_DATA_URI: Final = re.compile(r"data:.{0,4096}?;\s*base64\s*,", re.IGNORECASE | re.DOTALL)
_URI: Final = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)  # one letter is a drive of Windows
_FILE_NAME: Final = re.compile(r".{1,255}\.[a-z][a-z0-9]{1,4}", re.IGNORECASE)
_LOST_PLUS: Final = re.compile(r"[^\s=] +[^\s=]")  # spaces beside a line break are its indentation
_TO_STANDARD: Final = bytes.maketrans(b"-_", b"+/")  # from the url-safe alphabet
_WHITESPACE: Final = b" \t\r\n\f\v"
_NUM_SNIFFED: Final = 32  # characters of base64: of 24 bytes


def decode_text(source: str, check_size: Callable[[int], None]) -> bytes:
    """Decode base64 of either alphabet, with or without padding and line breaks, or a data: URI.

    check_size: called with the number of bytes before they are decoded. Raises InvalidImageError.
    """
    source = source.strip()
    if match := _DATA_URI.match(source):
        source = source[match.end() :].strip()
        source = unquote(source) if "%" in source else source
    else:
        _refuse_names(source)
    if _has_lost_plus(source):
        raise InvalidImageError(
            "the base64 has spaces where a form has decoded its '+'; write '+' as %2B, use the url-safe "
            "alphabet, or send the file itself"
        )
    try:
        text = source.encode("ascii").translate(_TO_STANDARD, _WHITESPACE)
        text += b"=" * (-len(text) % 4)
        check_size(len(text) * 3 // 4 - text[-2:].count(b"="))
        return binascii.a2b_base64(text, strict_mode=True)
    except (binascii.Error, ValueError) as exc:
        raise InvalidImageError(
            f"the image is not base64 ({exc}); use the standard or the url-safe alphabet"
        ) from exc


def _has_lost_plus(source: str) -> bool:
    """Return whether spaces stand for '+': they lie between characters, and are not those of equal lines."""
    if " " not in source or "+" in source or "-" in source or not _LOST_PLUS.search(source):
        return False
    widths = {len(line) for line in source.split()[:-1]}
    is_whole = len(source) % 4 == 0 and len(source.replace(" ", "")) % 4 != 0
    return len(widths) > 1 or is_whole


def explain_text(data: bytes) -> UnsupportedImageError | None:
    """Return the error for a file that is base64 of an image, or a data: URI; None for any other."""
    text = data[: 4 * _NUM_SNIFFED].translate(_TO_STANDARD, _WHITESPACE).removeprefix(b"\xef\xbb\xbf")
    try:
        if not text.lower().startswith(b"data:"):
            sniff_format(binascii.a2b_base64(text[:_NUM_SNIFFED], strict_mode=True))
    except (ModelError, binascii.Error):
        return None
    return UnsupportedImageError(
        "the file is the base64 of an image; decode it first, or send it as a text, without a file name"
    )


def _refuse_names(source: str) -> None:
    """Raise InvalidImageError for what names an image, and for a data: URI without base64."""
    scheme = _URI.match(source)
    if scheme and scheme[0].lower() == "data:":
        raise InvalidImageError(
            "the data: URI is not base64; write it as data:image/png;base64,…"
            if "," in source
            else "the data: URI ends before its base64; write it as data:image/png;base64,… "
            "(curl -F cuts a value at its first semicolon: use --form-string, or send -F image=@cat.png)"
        )
    if scheme:
        raise InvalidImageError("image URLs are not fetched here; send the file itself, in base64")
    if _FILE_NAME.fullmatch(source):
        raise InvalidImageError(
            f"{echo_value(source)} is the name of a file, and not its bytes; send the file itself "
            "(with curl: -F image=@cat.png), or its base64"
        )
