"""A generated corpus of broken image files through HTTP: no 5xx, no lost process, no lost memory."""

import random
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.attacks.harness import MemoryWatch
from tests.image_files import one_of_each_type
from tests.integration.pictures import in_base64
from tests.integration.processes import ServiceProcess, service

NUM_BIT_FLIPS = 200  # of each type
NUM_TRUNCATIONS = 16
NUM_CONNECTIONS = 4
IMAGES_PER_REQUEST = 32
HEADER_BYTES = 48  # in which the first sizes of every format lie, but TIFF's
LIES = (b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\xff\x7f\xff\x7f")
MAX_GROWTH_BYTES = 900 * 2**20
MAX_KEPT_BYTES = 200 * 2**20
# To other types, for what a broken file does.
ALIKE = {"palette png", "rgba png", "lzw tiff", "mpo", "avif", "lossy jpeg 2000"}
FILES = {name: data for name, data in one_of_each_type(40, 30).items() if name not in ALIKE}


def truncations(data: bytes) -> Iterator[bytes]:
    for index in range(NUM_TRUNCATIONS):
        yield data[: len(data) * index // NUM_TRUNCATIONS]


def bit_flips(data: bytes, chance: random.Random) -> Iterator[bytes]:
    """Yield copies with one to eight wrong bits; every other copy has them in its first 200 bytes."""
    for index in range(NUM_BIT_FLIPS):
        damaged = bytearray(data)
        within = len(data) if index % 2 else min(200, len(data))
        for _ in range(chance.randint(1, 8)):
            damaged[chance.randrange(within)] ^= 1 << chance.randrange(8)
        yield bytes(damaged)


def header_lies(data: bytes) -> Iterator[bytes]:
    """Yield copies in which each field of the header, one at a time, is huge, zero or odd."""
    for position in field_positions(data):
        for lie in LIES:
            damaged = bytearray(data)
            damaged[position : position + len(lie)] = lie
            if data.startswith(b"\x89PNG"):  # or its checksum would be the fault
                damaged[29:33] = struct.pack(">I", zlib.crc32(damaged[12:29]))
            yield bytes(damaged)


def field_positions(data: bytes) -> range:
    if data.startswith(b"II*\0"):  # counts and values of the tags
        (start,) = struct.unpack_from("<I", data, 4)
        return range(start + 6, len(data) - 4, 4)
    if b"\xff\x4f\xff\x51" in data:  # a codestream of JPEG 2000
        start = data.index(b"\xff\x4f\xff\x51")
        return range(start + 4, start + 60, 2)
    if data[4:8] == b"ftyp":  # boxes, as far as the pixels
        return range(8, data.index(b"mdat"), 4)
    if data.startswith(b"\xff\xd8"):
        sizes = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        return range(sizes + 2, sizes + 20, 2)
    return range(8, HEADER_BYTES, 2)


def corpus() -> Iterator[bytes]:
    chance = random.Random(0)
    for data in FILES.values():
        yield from truncations(data)
        yield from bit_flips(data, chance)
        yield from header_lies(data)


def batches() -> Iterator[list[bytes]]:
    files = corpus()
    while batch := list(islice(files, IMAGES_PER_REQUEST)):
        yield batch


def outcomes(url: str, files: list[bytes]) -> list[str]:
    """Caption files in one request; return the code of each error, or "ok"."""
    body: dict[str, Any] = {
        "images": [in_base64(data) for data in files],
        "num_beams": 1,
        "max_new_tokens": 1,
    }
    answer = httpx.post(f"{url}/caption", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return [result.get("error", {"code": "ok"})["code"] for result in answer.json()["results"]]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, random_checkpoint: Path) -> Iterator[ServiceProcess]:
    directory = tmp_path_factory.mktemp("service")
    # A full cache is no lost memory, and a small model leaves the time to the decoders.
    with service(directory, model=random_checkpoint, cache_bytes=0) as started:
        for _ in range(8):  # ordinary load, which fills the caches of torch
            outcomes(started.url, list(FILES.values()))
        yield started


def test_broken_files_of_every_type_are_answered_or_refused(running: ServiceProcess) -> None:
    assert len(FILES) >= 18
    with ThreadPoolExecutor(NUM_CONNECTIONS) as threads, MemoryWatch(running) as memory:
        answered = list(threads.map(partial(outcomes, running.url), batches()))
    codes = Counter(code for batch in answered for code in batch)
    assert set(codes) == {"ok", "invalid_image", "unsupported_image"}, codes
    assert codes.total() > len(FILES) * (NUM_BIT_FLIPS + NUM_TRUNCATIONS)
    assert memory.growth_bytes < MAX_GROWTH_BYTES
    assert memory.after_bytes - memory.before_bytes < MAX_KEPT_BYTES
    assert httpx.get(f"{running.url}/readyz").status_code == 200
    assert running.total("blip2_requests_total") > 0
    assert "Traceback" not in running.errors


@pytest.mark.parametrize("name", FILES)
def test_whole_files_are_answered_afterwards(running: ServiceProcess, name: str) -> None:
    assert outcomes(running.url, [FILES[name]]) == ["ok"]
