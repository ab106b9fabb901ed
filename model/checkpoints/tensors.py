"""Reads the weights of a directory, strictly: a tensor too many or too few is an error that names it."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model.checkpoints.json_records import read_json
from model.devices import CPU
from model.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_BLOCK_BYTES = 64 * 2**20
_READ_BYTES = 4 * 2**20
_READERS = 16  # more than cores: most of them wait for the disk
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A tensor without its values; `dtype` as safetensors names it, "F32", "BF16" and so on."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "TensorHeader":
        return cls(name, tuple(tensor.shape), _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)))

    @property
    def num_parameters(self) -> int:
        return math.prod(self.shape)


class TensorSource(Protocol):
    """Named tensors, wherever they are. `path` is named in messages."""

    @property
    def path(self) -> Path: ...

    def read(
        self,
        prefix: str = "",
        *,
        skip: tuple[str, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device = CPU,
    ) -> dict[str, Tensor]:
        """Gives the tensors whose name begins with `prefix` and with none of `skip`, under the rest of it.

        Each is cast to `dtype`, if it is floating, and moved to `device` before the next is read, so that a
        model never lies in memory twice. Where neither is needed, it stays a view of the file.
        """
        ...


class MemoryTensors:
    """The tensors of a file that was read as a whole."""

    def __init__(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        self.tensors = tensors
        self.path = path

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.tensors)

    def read(
        self,
        prefix: str = "",
        *,
        skip: tuple[str, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device = CPU,
    ) -> dict[str, Tensor]:
        """See `TensorSource`."""
        return {
            name.removeprefix(prefix): _put(tensor, dtype, device)
            for name, tensor in self.tensors.items()
            if name.startswith(prefix) and not name.startswith(skip)
        }


class TensorFiles:
    """The tensors of one safetensors file, or of the shards that an index beside it names."""

    def __init__(self, directory: Path, file_name: str = WEIGHTS) -> None:
        """Reads the headers only. Raises CheckpointError where a file is absent or damaged."""
        self.directory = directory
        self._files = [directory / name for name in _file_names(directory, file_name)]
        self.path = self._files[0] if len(self._files) == 1 else directory / INDEX  # named in messages
        for path in self._files:
            with _open(path):
                pass

    def read(
        self,
        prefix: str = "",
        *,
        skip: tuple[str, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device = CPU,
    ) -> dict[str, Tensor]:
        """See `TensorSource`."""
        found: dict[str, Tensor] = {}
        for path in self._files:
            with _open(path) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    if name.startswith(prefix) and not name.startswith(skip):
                        found[name.removeprefix(prefix)] = _put(tensors.get_tensor(name), dtype, device)
        return found

    def headers(self) -> list[TensorHeader]:
        """Gives what the files say of their tensors; reads no weights."""
        found = []
        for path in self._files:
            with _open(path) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    part = tensors.get_slice(name)
                    found.append(TensorHeader(name, tuple(part.get_shape()), part.get_dtype()))
        return found

    def sha256(self) -> str:
        """Gives the hash of the weights: the file's own, or that of the shards' hashes in order of name."""
        hashes = [hash_file(path) for path in sorted(self._files)]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def load_strictly(
    module: nn.Module, tensors: Mapping[str, Tensor], *, source: Path, tied: Iterable[str] = ()
) -> None:
    """Puts `tensors` in the place of all weights of `module`, which may have been built on "meta".

    tied: names that may be absent because the module shares them with another; tie them afterwards.
    Raises CheckpointError naming source, tensor and cure where names or shapes do not agree.
    """
    expected = module.state_dict()
    if missing := sorted(expected.keys() - tensors.keys() - set(tied)):
        raise CheckpointError(
            f"{source} lacks the tensor {missing[0]!r} ({len(missing)} are missing in all); "
            "it was cut, or belongs to another configuration: save the checkpoint again"
        )
    if unexpected := sorted(tensors.keys() - expected.keys()):
        raise CheckpointError(
            f"{source} holds the tensor {unexpected[0]!r}, which this model has no place for "
            f"({len(unexpected)} in all); its config.json belongs to another model: use the one saved with it"
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise CheckpointError(
                f"{source}: the tensor {name!r} is of type {tensor.dtype}, {expected[name].dtype} is needed; "
                "it was damaged, or belongs to another model: save the checkpoint again"
            )
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{source}: the tensor {name!r} has shape {list(tensor.shape)}, the configuration says "
                f"{list(expected[name].shape)}; use the config.json that was saved with these weights"
            )
    module.load_state_dict(dict(tensors), strict=False, assign=True)


def _file_names(directory: Path, file_name: str) -> list[str]:
    if (directory / file_name).is_file():
        return [file_name]
    if not (directory / INDEX).is_file():
        if pickles := sorted(path.name for path in directory.glob("pytorch_model*.bin")):
            raise CheckpointError(
                f"{directory} holds its weights as pickles ({pickles[0]}), which are not read, for they may "
                f"run code; save them as {file_name}, with transformers' save_pretrained"
            )
        return [file_name]
    shards = read_json(directory / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(map(_is_file_name, shards.values())):
        raise CheckpointError(f"{directory / INDEX} names no shards; save the checkpoint again")
    return sorted(set(shards.values()))


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read {path} ({error}); only whole safetensors files are read: copy or save it again"
        ) from error


def _put(tensor: Tensor, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else None)


def hash_file(path: Path) -> str:
    """Gives the sha256 of a file; of one longer than a block of 64 MiB, that of its blocks' sha256.

    The blocks are read side by side: weights of many gigabytes are hashed about as fast as they are read.
    """
    starts = range(0, max(path.stat().st_size, 1), _BLOCK_BYTES)
    with ThreadPoolExecutor(min(len(starts), _READERS)) as pool:
        digests = list(pool.map(partial(_hash_block, path), starts))
    return (digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()).hex()


def _hash_block(path: Path, start: int) -> bytes:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        left = _BLOCK_BYTES
        while left and (count := file.readinto(buffer[: min(left, _READ_BYTES)])):
            digest.update(buffer[:count])
            left -= count
    return digest.digest()
