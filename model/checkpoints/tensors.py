"""Named tensors of safetensors files, or in memory."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.checkpoints.foreign_tensors import check_names
from model.checkpoints.hashing import hash_file
from model.checkpoints.json_records import read_json
from model.devices import CPU
from model.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Name, shape and type of a tensor; `dtype` as safetensors names it, "F32", "BF16" and so on."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def from_tensor(cls, name: str, tensor: Tensor) -> "TensorHeader":
        return cls(name, tuple(tensor.shape), _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)))

    @property
    def num_parameters(self) -> int:
        return math.prod(self.shape)


class TensorSource(Protocol):
    """Named tensors, in files or in memory. path: for error messages."""

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
        """Return the tensors whose name begins with `prefix` and with none of `skip`, without the prefix.

        Each is cast to `dtype`, if it is floating, and moved to `device` before the next is read, so that a
        model is never in memory twice. Where neither is needed, it stays a view of the file.
        """
        ...


class MemoryTensors:
    """The tensors of a file that was read as a whole, for instance a pickle."""

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
            name.removeprefix(prefix): _convert(tensor, dtype, device)
            for name, tensor in self.tensors.items()
            if name.startswith(prefix) and not name.startswith(skip)
        }


class TensorFiles:
    """The tensors of one safetensors file, or of the shards that an index names."""

    def __init__(self, directory: Path, file_name: str = WEIGHTS) -> None:
        """Open the files and read their headers.

        Raises CheckpointError where one is absent or damaged, and for the tensors of a wrapped, quantised or
        unmerged model.
        """
        self.directory = directory
        self._files = [directory / name for name in _file_names(directory, file_name)]
        self.path = self._files[0] if len(self._files) == 1 else directory / INDEX
        for path in self._files:
            with _open(path) as tensors:
                check_names(tensors.keys(), path)

    def read(
        self,
        prefix: str = "",
        *,
        skip: tuple[str, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device = CPU,
    ) -> dict[str, Tensor]:
        """See `TensorSource`."""
        selected: dict[str, Tensor] = {}
        for path in self._files:
            with _open(path) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    if name.startswith(prefix) and not name.startswith(skip):
                        selected[name.removeprefix(prefix)] = _convert(
                            tensors.get_tensor(name), dtype, device
                        )
        return selected

    def headers(self) -> list[TensorHeader]:
        """Return names, shapes and types of all tensors; reads no weights."""
        headers = []
        for path in self._files:
            with _open(path) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    header = tensors.get_slice(name)
                    headers.append(TensorHeader(name, tuple(header.get_shape()), header.get_dtype()))
        return headers

    def sha256(self) -> str:
        """Return the hash of the weights: the file's own, or that of the shards' hashes in order of name."""
        hashes = [hash_file(path) for path in sorted(self._files)]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


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


def _convert(tensor: Tensor, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else None)
