"""Hashes of weight files."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

BLOCK_BYTES = 64 * 2**20
_READ_BYTES = 4 * 2**20
_NUM_THREADS = 16  # more than cores: most of them wait for the disk


def hash_file(path: Path, *, block_bytes: int = BLOCK_BYTES, read_bytes: int = _READ_BYTES) -> str:
    """Return the sha256 of a file; of one longer than a block of 64 MiB, that of its blocks' sha256.

    Blocks are hashed in parallel: weights of many gigabytes are hashed about as fast as they are read.
    block_bytes: changes the hash of long files. read_bytes: of one read from the disk.
    """
    starts = range(0, max(path.stat().st_size, 1), block_bytes)
    hash_block = partial(_hash_block, path, block_bytes=block_bytes, read_bytes=read_bytes)
    with ThreadPoolExecutor(min(len(starts), _NUM_THREADS)) as pool:
        digests = list(pool.map(hash_block, starts))
    return (digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()).hex()


def _hash_block(path: Path, start: int, *, block_bytes: int, read_bytes: int) -> bytes:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(read_bytes))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        remaining = block_bytes
        while remaining and (count := file.readinto(buffer[: min(remaining, read_bytes)])):
            digest.update(buffer[:count])
            remaining -= count
    return digest.digest()
