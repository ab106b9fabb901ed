"""Decodes an image file within limits of memory and CPU time that the kernel enforces.

For a process that does nothing else: one that exceeds its CPU time is killed.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

from model.errors import InvalidImageFileError
from model.images.decoding import decode_image, prepare_decoder
from model.images.header import sniff_format

_M_MMAP_THRESHOLD: Final = -3
_M_TRIM_THRESHOLD: Final = -1
_KEPT_BYTES: Final = 2**25  # that were freed: new pages cost a quarter of the time of decoding a small image
_M_ARENA_MAX: Final = -8
_PR_SET_PDEATHSIG: Final = 1
_STATM: Final = Path("/proc/self/statm")
_HAS_LIMITS: Final = sys.platform == "linux"

if sys.platform != "win32":
    import resource


@cache
def prepare_process() -> None:
    """Prepare this process for decoding: it ends with its parent, ignores Ctrl-C, and gives memory back.

    It writes no errors, either: libtiff's own messages would fill a pipe that nobody reads.
    """
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the service ends its processes itself
    if _HAS_LIMITS:
        library = ctypes.CDLL(None)
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(AttributeError):  # musl has no mallopt, and gives memory back anyway
            library.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
            library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
            library.mallopt(_M_ARENA_MAX, 1)  # another one for a thread would count 64 MiB


def decode_within_limits(
    data: bytes, side: int, *, max_pixels: int, max_bytes: int, max_cpu_s: float
) -> bytes:
    """Decode an image file into the [side, side, 3] bytes of its pixels.

    max_bytes: to allocate. Raises InvalidImageFileError. Where it takes longer than max_cpu_s of CPU time,
    the process dies.
    """
    prepare_process()
    prepare_decoder(sniff_format(data))  # which takes memory that is not the file's
    with _limits(max_bytes, max_cpu_s):
        try:
            return decode_image(data, side, max_pixels=max_pixels).tobytes()
        except MemoryError:
            message = f"decoding the image takes more than {max_bytes} bytes; save it again as a PNG or JPEG"
    raise InvalidImageFileError(message)


@contextlib.contextmanager
def _limits(max_bytes: int, max_cpu_s: float) -> Iterator[None]:
    if not _HAS_LIMITS:
        yield
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    used_bytes = int(_STATM.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + max_bytes, hard))
    signal.setitimer(signal.ITIMER_PROF, max_cpu_s)  # its signal ends the process
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
