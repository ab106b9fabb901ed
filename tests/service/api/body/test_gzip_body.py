"""Bodies in gzip: what they unpack to is as a body that came as it is, and has its limits."""

import asyncio
import gzip
import json
import random
import time
import tracemalloc
import zlib
from collections.abc import Mapping

import pytest
from starlette.requests import Request
from starlette.types import Message

from service.api.body.gzip_body import unpack
from service.api.routes import BodyReader
from service.api.schemas import CaptionRequest
from service.errors import (
    BodyTooLargeError,
    ClientGoneError,
    DeadlineExceededError,
    OverloadedError,
    UnreadableBodyError,
)
from service.image_decoding import Upload
from service.runtime.readiness import UploadLease, Uploads
from service.runtime.settings import Settings
from tests.service.api.bodies import JSON, LIMIT, multipart, read

IN_GZIP = {**JSON, "content-encoding": "gzip"}
MIB = 2**20


def body_of(num_bytes: int) -> bytes:
    """Return a JSON body of this size, which gzip makes a thousand times smaller."""
    return json.dumps({"image": "x"}).encode().ljust(num_bytes)


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", " x-gzip "])
@pytest.mark.parametrize("level", [0, 1, 9])
async def test_a_body_may_be_in_gzip(encoding: str, level: int) -> None:
    content = gzip.compress(body_of(LIMIT - 100), level)
    body = await read(CaptionRequest, content, {**JSON, "content-encoding": encoding})
    assert body.image == Upload("x")


async def test_a_form_may_be_in_gzip() -> None:
    content, headers = multipart([("image", b"\x89PNG")], [("num_beams", "2")])
    body = await read(CaptionRequest, gzip.compress(content), {**headers, "content-encoding": "gzip"})
    assert (body.image, body.num_beams) == (Upload(b"\x89PNG"), 2)


@pytest.mark.parametrize("num_bytes", [0, 1, MIB - 1, MIB, MIB + 1, 3 * MIB])
@pytest.mark.parametrize("is_random", [True, False])
def test_all_is_unpacked_in_small_pieces(num_bytes: int, is_random: bool) -> None:
    content = random.Random(0).randbytes(num_bytes) if is_random else bytes(num_bytes)
    compressed = bytearray(gzip.compress(content, 1))
    pieces = list(unpack(compressed))
    assert b"".join(pieces) == content
    assert all(len(piece) <= MIB for piece in pieces)


def test_gzip_of_several_members_is_unpacked_whole() -> None:
    members = [b"a", b"", bytes(2 * MIB), b"b" * 9]
    compressed = bytearray(b"".join(map(gzip.compress, members)))
    assert b"".join(unpack(compressed)) == b"".join(members)
    most = bytearray(gzip.compress(b"") * 1000)
    assert b"".join(unpack(most)) == b""
    with pytest.raises(UnreadableBodyError, match="more than 1000 members; compress it in one piece"):
        list(unpack(most + gzip.compress(b"a")))


COMPRESSED = gzip.compress(body_of(5000))


DAMAGED = {
    "no gzip": (body_of(100), "cannot be unpacked"),
    "zlib": (zlib.compress(body_of(100)), "cannot be unpacked"),
    "last byte missing": (COMPRESSED[:-1], "ends before its end mark"),
    "check sum missing": (COMPRESSED[:-8], "ends before its end mark"),
    "data missing": (COMPRESSED[:12], "ends before its end mark"),
    "half a header": (COMPRESSED[:5], "ends before its end mark"),
    "more behind it": (COMPRESSED + b"more", "cannot be unpacked"),
    "another check sum": (COMPRESSED[:-8] + bytes(4) + COMPRESSED[-4:], "cannot be unpacked"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
async def test_damaged_gzip_is_unreadable(content: bytes, message: str) -> None:
    with pytest.raises(UnreadableBodyError, match=message):
        await read(CaptionRequest, content, IN_GZIP)


async def test_an_empty_body_in_gzip_is_no_json() -> None:
    for content in (b"", gzip.compress(b"")):
        with pytest.raises(UnreadableBodyError, match="is not JSON"):
            await read(CaptionRequest, content, IN_GZIP)


async def test_the_limit_is_on_what_a_body_unpacks_to() -> None:
    assert (await read(CaptionRequest, gzip.compress(body_of(LIMIT)), IN_GZIP)).image
    with pytest.raises(BodyTooLargeError, match=f"{LIMIT + 1} bytes or more, the limit is {LIMIT}"):
        await read(CaptionRequest, gzip.compress(body_of(LIMIT + 1)), IN_GZIP)


class Arriving:
    """A request whose body has arrived, from a caller who stays connected until `leave` is called."""

    def __init__(self, content: bytes, headers: Mapping[str, str] = IN_GZIP) -> None:
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._messages.put_nowait({"type": "http.request", "body": content, "more_body": False})
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": "/", "headers": raw}
        self.request = Request(scope, self._messages.get)

    def leave(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})


async def read_with(
    settings: Settings, content: bytes, lease: UploadLease, deadline: float | None = None
) -> CaptionRequest:
    return await BodyReader(settings).read(Arriving(content).request, CaptionRequest, lease, deadline)


async def test_a_bomb_is_refused_while_it_unpacks_within_little_memory() -> None:
    """1 GiB, in 1 MB of gzip, against a limit of 8 MiB."""
    bomb = await asyncio.to_thread(gzip.compress, bytes(1024 * MIB), 1)
    settings = Settings(max_body_bytes=8 * MIB, max_image_bytes=8 * MIB)
    uploads = Uploads(settings.max_upload_bytes)
    lease = uploads.open("")
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLargeError):
            await read_with(settings, bomb, lease)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * MIB * 2 + 3 * len(bomb) + 4 * MIB
    lease.close()
    assert uploads.num_bytes == 0


async def test_the_budget_of_uploads_counts_what_is_unpacked() -> None:
    content = body_of(3 * MIB)
    compressed = gzip.compress(content)
    settings = Settings()
    uploads = Uploads(4 * MIB)
    first = uploads.open("a")
    await read_with(settings, compressed, first)
    assert uploads.num_bytes == first.num_bytes == len(content)
    with pytest.raises(OverloadedError, match="send it again"):
        await read_with(settings, compressed, uploads.open("b"))
    first.close()
    await read_with(settings, compressed, uploads.open("c"))


async def test_a_deadline_or_a_caller_who_leaves_ends_the_unpacking() -> None:
    settings = Settings()
    lease = Uploads(settings.max_upload_bytes).open("")
    compressed = gzip.compress(body_of(60 * MIB), 1)
    with pytest.raises(DeadlineExceededError):
        await read_with(settings, compressed, lease, time.monotonic() + 0.005)
    arriving = Arriving(compressed)
    arriving.leave()
    with pytest.raises(ClientGoneError):
        await BodyReader(settings).read(arriving.request, CaptionRequest, lease, None)


async def test_small_bodies_pass_while_a_large_one_is_unpacked() -> None:
    settings = Settings()
    reader, uploads = BodyReader(settings), Uploads(settings.max_upload_bytes)
    order = []

    async def read_one(name: str, num_bytes: int) -> None:
        request = Arriving(gzip.compress(body_of(num_bytes), 1)).request
        await reader.read(request, CaptionRequest, uploads.open(name), None)
        order.append(name)

    await asyncio.gather(read_one("large", 60 * MIB), read_one("small", 100), read_one("second", 2 * MIB))
    assert order == ["small", "second", "large"]
