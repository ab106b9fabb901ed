"""Request bodies for tests, and a reader that has them from the wire in chunks."""

import asyncio
from collections.abc import Mapping
from typing import TypeVar

from starlette.requests import Request
from starlette.types import Message

from service.api.routes import BodyReader
from service.api.schemas import Body
from service.runtime.readiness import Uploads
from service.runtime.settings import Settings

LIMIT = 10_000
SETTINGS = Settings(max_body_bytes=LIMIT, max_image_bytes=LIMIT)
FEW = Settings(max_images=3, max_questions=3, max_candidates=3)
JSON = {"content-type": "application/json"}
MAX_VALUES = 4 * 3 + 256  # of FEW

B = TypeVar("B", bound=Body)


async def read(
    schema: type[B], content: bytes, headers: Mapping[str, str], settings: Settings = SETTINGS
) -> B:
    """Read a body that comes in chunks, from a caller who stays connected."""
    chunks = [content[start : start + 100] for start in range(0, len(content), 100)] or [b""]

    async def receive() -> Message:
        if not chunks:
            await asyncio.Event().wait()
        body = chunks.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(chunks)}

    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": raw}
    lease = Uploads(settings.max_upload_bytes).open("")
    return await BodyReader(settings).read(Request(scope, receive), schema, lease, None)


def multipart(files: list[tuple[str, bytes]], fields: list[tuple[str, str]]) -> tuple[bytes, dict[str, str]]:
    lines = []
    for name, value in fields:
        lines.append(
            b'--frontier\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
            % (name.encode(), value.encode())
        )
    for name, data in files:
        lines.append(
            b'--frontier\r\nContent-Disposition: form-data; name="%s"; filename="f.png"\r\n'
            b"Content-Type: image/png\r\n\r\n%s\r\n" % (name.encode(), data)
        )
    return b"".join([*lines, b"--frontier--\r\n"]), {"content-type": "multipart/form-data; boundary=frontier"}
