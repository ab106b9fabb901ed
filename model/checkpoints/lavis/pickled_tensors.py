"""Reads the tensors of a .pth file, which is a pickle, without running code in it."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch
from torch import Tensor

from model.checkpoints.foreign_tensors import check_names
from model.errors import CheckpointError


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .pth file without running code in it; those of a zip stay pages of the file.

    Raises CheckpointError where the file is absent or damaged, or holds anything but dense tensors.
    """
    try:
        _check_uncompressed(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors and would run code when it is read, so it is "
            "refused; copy it again, or save its state dict alone, with torch.save(model.state_dict(), path)"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # what torch raises at damaged bytes shares no base
        raise CheckpointError(
            f"cannot read {path} ({type(error).__name__}: {str(error)[:200]}); it was cut or damaged: copy "
            "it again"
        ) from error
    tensors = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(each, str) for each in tensors):
        raise CheckpointError(f"{path} holds no state dict, neither itself nor as 'model'; save it again")
    _check_dense(tensors, path)
    check_names(tensors, path)
    return tensors


def _check_uncompressed(path: Path) -> None:
    """Raise CheckpointError for a compressed zip, of any size in memory; torch writes none."""
    if is_zipfile(path):
        with ZipFile(path) as file:
            if any(each.compress_type != ZIP_STORED for each in file.infolist()):
                raise CheckpointError(
                    f"{path} is a compressed zip file, which torch does not write; unpack it, or save the "
                    "state dict again, with torch.save"
                )


def _check_dense(tensors: Mapping[str, object], path: Path) -> None:
    """Raise CheckpointError for whatever is no tensor whose numbers all lie in the file."""
    for name, each in tensors.items():
        if not isinstance(each, Tensor):
            raise CheckpointError(
                f"{path} holds no state dict: {name!r} is a {type(each).__name__}, no tensor; save the state "
                "dict alone, with torch.save(model.state_dict(), path)"
            )
        is_plain = each.layout == torch.strided and not (each.is_nested or each.is_quantized or each.is_meta)
        if not is_plain or each.nbytes > each.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: the tensor {name!r} is no dense one, all of whose numbers lie in the file; save it "
                "as a dense tensor, with tensor.to_dense() or tensor.contiguous()"
            )
