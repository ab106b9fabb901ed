"""Unpacks gzip bodies in steps, so that a body which unpacks to too much can be refused meanwhile."""

import zlib
from collections.abc import Iterator
from typing import Final

from service.errors import UnreadableBodyError

GZIP: Final = ("gzip", "x-gzip")  # names of the content encoding
_MAX_STEP_BYTES: Final = 2**20  # which takes up to 5 ms
_MAX_READ_BYTES: Final = 2**18
_MAX_MEMBERS: Final = 1000  # each takes a step
_WITH_HEADER: Final = zlib.MAX_WBITS + 16


def unpack(compressed: bytearray) -> Iterator[bytes]:
    """Yield what a gzip body of one member or several unpacks to, up to 1 MiB at a time.

    Raises UnreadableBodyError for what is no gzip, is damaged or is not whole.
    """
    at = num_members = 0
    while at < len(compressed):
        num_members += 1
        if num_members > _MAX_MEMBERS:
            raise UnreadableBodyError(
                f"the gzip body has more than {_MAX_MEMBERS} members; compress it in one piece"
            )
        member = zlib.decompressobj(_WITH_HEADER)
        while not member.eof:
            given = compressed[at : at + _MAX_READ_BYTES]
            try:
                piece = member.decompress(given, _MAX_STEP_BYTES)
            except zlib.error as exc:
                raise UnreadableBodyError(
                    f"the gzip body cannot be unpacked: {exc}; check how it is compressed"
                ) from exc
            if not (given or piece or member.eof):
                raise UnreadableBodyError("the gzip body ends before its end mark; send it whole")
            at += len(given) - len(member.unused_data or member.unconsumed_tail)
            yield piece
