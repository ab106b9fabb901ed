"""Attacks: requests and connections that are cheap to send and made to be costly to serve."""

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from functools import cache, partial
from itertools import count

import httpx

from benchmarks.attacks import hostile_files

NUM_SILENT_CONNECTIONS = 200
_UPLOAD_BYTES = 58_000_000
_NUM_UPLOADS = 8
_HOLD_S = 5.0

Attack = Callable[[httpx.AsyncClient], Awaitable[str]]  # returns the status, or what was done instead

_seeds = count()


def attacks(address: str) -> dict[str, Attack]:
    """Return all attacks by name; their connections come from this address of this machine."""
    return {
        "JSON: list of two million zeros": _json(lambda: b'{"images":[' + b"0," * 2_000_000 + b"0]}"),
        "JSON: key of 8 MB": _json(lambda: b'{"' + b"k" * 8_000_000 + b'":0}'),
        "JSON: 500,000 keys": _json(lambda: _object(500_000)),
        "JSON: nesting of a million": _json(lambda: b'{"image":' + b"[" * 1_000_000),
        "JPEG of 600 scans": _image(hostile_files.jpeg_of_many_scans),
        "PNG of 1 x 40,000,000": _image(partial(hostile_files.png, 1, 40_000_000)),
        "PNG of 6,300 x 6,300 in RGBA, 16 bit": _image(
            partial(hostile_files.png, 6300, 6300, bit_depth=16, colour_type=6)
        ),
        "TIFF with a tile of 45,008 x 45,008": _image(hostile_files.tiff_of_large_tile),
        "TIFF with two million tiles": _image(hostile_files.tiff_of_many_tiles),
        "JPEG with flipped bits": _damaged_photo,
        f"{_NUM_UPLOADS} unfinished uploads of 58 MB": partial(_unfinished_uploads, address=address),
        f"{NUM_SILENT_CONNECTIONS} silent connections": partial(_silent_connections, address=address),
        "form cut off": _form(b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\nx'),
        "form of an unknown charset": _form(
            b'--b\r\nContent-Disposition: form-data; name="image"\r\n'
            b"Content-Type: text/plain; charset=no-such\r\n\r\nx\r\n--b--\r\n"
        ),
        "15 questions, the first of 495 words": _vqa(["word " * 495, *["what is it?"] * 14]),
        "32 questions x 16 beams x 32 tokens": _vqa(
            [f"question {index}?" for index in range(32)], num_beams=16, max_new_tokens=32
        ),
        "retrieval over 1,000 images": _retrieve,
    }


def _object(num_keys: int) -> bytes:
    return b"{" + b",".join(b'"k%d":0' % index for index in range(num_keys)) + b"}"


def _json(make: Callable[[], bytes], path: str = "/caption") -> Attack:
    made = cache(make)

    async def attack(client: httpx.AsyncClient) -> str:
        response = await client.post(path, content=made(), headers={"Content-Type": "application/json"})
        return str(response.status_code)

    return attack


def _image(make: Callable[[], bytes]) -> Attack:
    return _json(lambda: json.dumps({"image": base64.b64encode(make()).decode()}).encode())


def _vqa(questions: list[str], **fields: object) -> Attack:
    image = base64.b64encode(hostile_files.png(64, 64)).decode()
    return _json(lambda: json.dumps({"image": image, "question": questions, **fields}).encode(), "/vqa")


def _form(body: bytes) -> Attack:
    async def attack(client: httpx.AsyncClient) -> str:
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        return str((await client.post("/caption", content=body, headers=headers)).status_code)

    return attack


async def _damaged_photo(client: httpx.AsyncClient) -> str:
    image = base64.b64encode(hostile_files.damaged_photo(next(_seeds))).decode()
    return str((await client.post("/caption", json={"image": image})).status_code)


def retrieval(num_images: int) -> dict[str, object]:
    """Return the body of a request to /retrieve with so many images, which nobody sent before."""
    files = (hostile_files.png(16, 16) + b"%d" % next(_seeds) for _ in range(num_images))
    images = [base64.b64encode(file).decode() for file in files]
    return {"text": "a red circle", "candidates": {"images": images}}


async def _retrieve(client: httpx.AsyncClient) -> str:
    return str((await client.post("/retrieve", json=retrieval(1000))).status_code)


async def _unfinished_uploads(client: httpx.AsyncClient, *, address: str) -> str:
    await asyncio.gather(*(_hold(client, address, _half_upload) for _ in range(_NUM_UPLOADS)))
    return "held"


async def _silent_connections(client: httpx.AsyncClient, *, address: str) -> str:
    await asyncio.gather(*(_hold(client, address, None) for _ in range(NUM_SILENT_CONNECTIONS)))
    return "held"


async def _half_upload(writer: asyncio.StreamWriter) -> None:
    head = "POST /caption HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f'{head}Content-Length: {_UPLOAD_BYTES}\r\n\r\n{{"image":"'.encode())
    for _ in range(_UPLOAD_BYTES // 2_000_000):
        writer.write(b"A" * 1_000_000)
        await writer.drain()


async def _hold(
    client: httpx.AsyncClient, address: str, send: Callable[[asyncio.StreamWriter], Awaitable[None]] | None
) -> None:
    """Open a connection, send something, keep it open for a while, and close it unfinished."""
    writer = None
    try:
        async with asyncio.timeout(_HOLD_S):
            reader, writer = await asyncio.open_connection(
                client.base_url.host, client.base_url.port, local_addr=(address, 0)
            )
            if send is not None:
                await send(writer)
            await reader.read()  # until the service closes the connection, or the time is over
    except (TimeoutError, OSError):
        return
    finally:
        if writer is not None:
            writer.transport.abort()
