"""The format of tensors and keys in Redis: raw numbers behind a fixed header. Nothing is ever unpickled."""

import hashlib
import math
import struct
import zlib
from typing import Final

import torch
from torch import Tensor

from model import EmbeddingKind

_MAGIC: Final = b"BL2E"
_VERSION: Final = 2
_MAX_DIMS: Final = 3
_HEADER: Final = struct.Struct("<4sBBBx3I")  # magic, version, dtype, number of dimensions, the dimensions
_CHECKSUM: Final = struct.Struct("<I")  # CRC-32 of key, header and numbers
_START: Final = _HEADER.size + _CHECKSUM.size
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


class WireError(ValueError):
    """The bytes are not a tensor that `pack` wrote."""


def pack(key: str, tensor: Tensor) -> bytes:
    """Serialize a CPU tensor of up to 3 dimensions, of float32, bfloat16 or float16, bound to its key."""
    body = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    shape = (*tensor.shape, *[0] * (_MAX_DIMS - tensor.dim()))
    header = _HEADER.pack(_MAGIC, _VERSION, _DTYPES.index(tensor.dtype), tensor.dim(), *shape)
    return header + _CHECKSUM.pack(_checksum(key, header, body)) + body


def unpack(key: str, data: bytes) -> Tensor:
    """Deserialize a tensor.

    Raises WireError where magic, version, size, checksum or key is wrong, or it has no elements.
    """
    if len(data) < _START:
        raise WireError(f"{len(data)} bytes are shorter than the header")
    magic, version, dtype_index, num_dims, *shape = _HEADER.unpack_from(data)
    (checksum,) = _CHECKSUM.unpack_from(data, _HEADER.size)
    if magic != _MAGIC or version != _VERSION or dtype_index >= len(_DTYPES) or num_dims > _MAX_DIMS:
        raise WireError("the header is not of this version")
    dtype, shape = _DTYPES[dtype_index], shape[:num_dims]
    body = memoryview(data)[_START:]
    if not body or len(body) != math.prod(shape) * dtype.itemsize:
        raise WireError(f"{len(body)} bytes do not hold {shape} of {dtype}")
    if _checksum(key, data[: _HEADER.size], body) != checksum:
        raise WireError("the checksum differs")
    # A copy: torch wants memory that may be written to, and the reply is not.
    return torch.frombuffer(bytearray(body), dtype=dtype).reshape(shape)


def _checksum(key: str, header: bytes, body: bytes | memoryview) -> int:
    return zlib.crc32(body, zlib.crc32(header, zlib.crc32(key.encode())))


def redis_key(*, digest: str, fingerprint: str, preprocess_version: str, kind: EmbeddingKind) -> str:
    """Compute the key of one embedding of one image file by one model.

    Each field is preceded by its length before all are hashed, so that no two lists of fields collide.
    """
    framed = hashlib.sha256()
    for field in (digest, fingerprint, preprocess_version, kind.value):
        data = field.encode()
        framed.update(struct.pack("<I", len(data)) + data)
    return f"blip2:{_VERSION}:{framed.hexdigest()}"
