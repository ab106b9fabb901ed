"""Image decoding: bytes to a file to its pixels, in processes that are killed where they take too long.

Formats: JPEG, PNG, WebP, GIF, TIFF, BMP, JPEG 2000, AVIF, HEIC; of several images the first one. Samples of
more than 8 bits are scaled to 8 bits; the orientation is applied; transparency turns white. Bad input fails
here.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import partial
from typing import Any, Final, TypeVar

import torch
from anyio import BrokenWorkerProcess, CapacityLimiter, open_process, to_process
from anyio.abc import Process
from torch import Tensor

from model.errors import ModelError
from model.images.header import ImageHeader, check_size, find_warnings, memory_of, read_header
from model.images.limits import decode_within_limits, prepare_process
from service.engine.fair_queueing import FairSemaphore
from service.errors import ImageTooLargeError, InvalidImageError, NotReadyError, for_caller
from service.image_text import decode_text, explain_text

# To be increased when the same file would be decoded into other pixels than before.
PREPROCESS_VERSION: Final = "4"
SMALL_DECODE_BYTES: Final = 32 * 2**20  # a photo of 3 Mpx

_SMALL_CPU_S: Final = 0.5
_WALL_FACTOR: Final = 20  # of CPU time: a large image waits for whatever else the machine does
_SMALL_FILE_BYTES: Final = 2**18  # a larger one is hashed in a thread, which takes a millisecond and more
_RETRY_S: Final = 5
_STARTED: Final = ContextVar[list[Process]]("started")  # the processes that a call has started
T = TypeVar("T")
S = TypeVar("S", str, bytes, str | bytes)


@dataclass(slots=True)
class Upload:
    """An image as received, which is taken once, so that nothing holds it longer than its decoding.

    source: base64, a data: URI, or the file itself; None once taken. field: its name in errors. caller: see
    `Request`. release: called with the size of the source when it and the file are dropped. warnings: see
    `ImageFile`.
    """

    source: str | bytes | None
    field: str = "image"
    caller: str = ""
    release: Callable[[int], None] | None = dataclass_field(default=None, compare=False)
    num_bytes: int = dataclass_field(init=False, compare=False)
    warnings: tuple[str, ...] = dataclass_field(default=(), init=False, compare=False)

    def __post_init__(self) -> None:
        self.num_bytes = len(self.source or b"")

    def take(self) -> str | bytes:
        """Return the source, and drop it here."""
        source, self.source = self.source, None
        assert source is not None
        return source

    def drop(self) -> None:
        """Drop the source, and report that the file is dropped too."""
        self.source = None
        if self.release is not None:
            self.release(self.num_bytes)


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file as it was received.

    digest: the SHA-256 of its bytes, in hex. warnings: what its sender should know of a file that is read.
    """

    data: bytes
    digest: str
    warnings: tuple[str, ...] = ()


class ImageDecoder:
    """Reads image files on the event loop, and decodes them in processes.

    max_bytes, max_pixels: of one file. num_processes: how many small images are decoded at once, and how many
    large ones. max_decode_bytes, max_cpu_s: memory and CPU time for one image; together, the large ones take
    no more than max_decode_bytes.
    """

    def __init__(
        self, *, max_bytes: int, max_pixels: int, num_processes: int, max_decode_bytes: int, max_cpu_s: float
    ) -> None:
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._processes = DecodeProcesses(
            num_processes, max_decode_bytes=max_decode_bytes, max_cpu_s=max_cpu_s
        )

    async def start(self) -> None:
        """Start the processes, which takes a tenth of a second, before the first image comes."""
        await self._processes.start()

    async def read(self, source: str | bytes) -> ImageFile:
        """Read base64, a data URI, or the bytes themselves.

        Raises ImageTooLargeError (413), UnsupportedImageError (415) or InvalidImageError (422).
        """
        return await _in_thread_if_large(self._read, source)

    async def decode_pixels(self, file: ImageFile, image_size: int, *, caller: str = "") -> Tensor:
        """Decode a file into [S, S, 3] uint8 pixels; callers take turns.

        Raises InvalidImageError where the file is damaged or exceeds a limit, and NotReadyError where no
        process can be started.
        """
        try:
            header = await _in_thread_if_large(read_header, file.data)
            check_size(header.width, header.height, self._max_pixels)
            pixels = await self._processes.decode(file.data, header, image_size, self._max_pixels, caller)
        except ModelError as exc:
            raise for_caller(exc) from exc
        return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(image_size, image_size, 3)

    def _read(self, source: str | bytes) -> ImageFile:
        if isinstance(source, str):
            source = decode_text(source, self._check_size)
        self._check_size(len(source))
        try:
            warnings = find_warnings(source)
        except ModelError as exc:
            raise explain_text(source) or for_caller(exc) from exc
        return ImageFile(source, hashlib.sha256(source).hexdigest(), warnings)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise ImageTooLargeError(
                f"the image file has {num_bytes} bytes, the limit is {self._max_bytes}; "
                "compress or downscale it"
            )


class DecodeProcesses:
    """Decodes in processes, small images apart from large ones, so that these hold nobody up.

    An image is small that needs little memory and little CPU time. What takes longer starts again as a large
    one. Within each group, callers take turns.
    """

    def __init__(self, num_of_each: int, *, max_decode_bytes: int, max_cpu_s: float) -> None:
        self._num_of_each = num_of_each
        self._max_decode_bytes = max_decode_bytes
        self._max_cpu_s = max_cpu_s
        self._small = FairSemaphore(num_of_each)
        self._large = FairSemaphore(num_of_each)
        self._large_bytes = ByteBudget(max_decode_bytes)
        self._processes = CapacityLimiter(2 * num_of_each)

    async def start(self) -> None:
        """Start those for small images. Raises NotReadyError where they cannot be started."""
        await asyncio.gather(*(self._check_that_processes_start() for _ in range(self._num_of_each)))

    async def decode(
        self, data: bytes, header: ImageHeader, image_size: int, max_pixels: int, caller: str
    ) -> bytes:
        """Decode an image file; see `decode_within_limits`, whose errors it raises.

        Raises InvalidImageError too where the process dies, and NotReadyError where none can be started.
        """
        num_bytes = memory_of(header, image_size, len(data))
        if num_bytes > self._max_decode_bytes:
            raise InvalidImageError(
                f"decoding the image takes {num_bytes} bytes, the limit is {self._max_decode_bytes} "
                "(BLIP2_DECODE_BYTES); downscale it, or save it as a plain JPEG or PNG"
            )
        work = partial(decode_within_limits, data, image_size, max_pixels=max_pixels, max_bytes=num_bytes)
        if num_bytes <= SMALL_DECODE_BYTES:
            async with self._small.hold(caller):
                with suppress(BrokenWorkerProcess, TimeoutError):
                    return await self._run(partial(work, max_cpu_s=min(_SMALL_CPU_S, self._max_cpu_s)))
        async with self._large.hold(caller), self._large_bytes.hold(num_bytes):
            try:
                return await self._run(partial(work, max_cpu_s=self._max_cpu_s))
            except (BrokenWorkerProcess, OSError):
                await self._check_that_processes_start()
                raise InvalidImageError(
                    f"decoding the image takes more than {self._max_cpu_s:g} s of CPU time "
                    "(BLIP2_DECODE_TIMEOUT_MS), or ends its decoder; "
                    "downscale it, or save it as a plain JPEG or PNG"
                ) from None

    async def _run(self, work: Callable[[], T]) -> T:
        """Run a call in a process; cancelling it kills the process, and another one takes its place."""
        started = list[Process]()
        _STARTED.set(started)
        async with asyncio.timeout(_WALL_FACTOR * self._max_cpu_s):
            try:
                return await to_process.run_sync(work, cancellable=True, limiter=self._processes)
            except asyncio.CancelledError:
                for process in started:  # anyio leaves one that was cancelled while it started
                    with suppress(ProcessLookupError):
                        process.kill()
                    await process.aclose()
                raise

    async def _check_that_processes_start(self) -> None:
        """Raise NotReadyError where a process does not start: then it is not the image that is at fault."""
        try:
            await self._run(prepare_process)
        except (BrokenWorkerProcess, OSError) as exc:
            raise NotReadyError(
                "no process for decoding can be started; see the log of the service", retry_after_s=_RETRY_S
            ) from exc


async def _open_and_note(*args: Any, **options: Any) -> Process:
    process = await open_process(*args, **options)
    _STARTED.get().append(process)
    return process


# What anyio calls to start a process: nothing else tells of one that is cancelled while it starts.
to_process.open_process = _open_and_note  # type: ignore[attr-defined]


class ByteBudget:
    """A semaphore that counts bytes. First come, first served: no one who needs much is passed for ever."""

    def __init__(self, num_bytes: int) -> None:
        self._free_bytes = num_bytes
        self._first = asyncio.Lock()  # held by the one that is served next
        self._released = asyncio.Event()

    @asynccontextmanager
    async def hold(self, num_bytes: int) -> AsyncIterator[None]:
        """Wait for bytes, at most those of the whole budget, and hold them inside the block."""
        async with self._first:
            while self._free_bytes < num_bytes:
                self._released.clear()
                await self._released.wait()
            self._free_bytes -= num_bytes
        try:
            yield
        finally:
            self._free_bytes += num_bytes
            self._released.set()


async def _in_thread_if_large(function: Callable[[S], T], source: S) -> T:
    if len(source) <= _SMALL_FILE_BYTES:
        return function(source)
    return await asyncio.to_thread(function, source)
