"""Tensors and hashes of safetensors files."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from model import CheckpointError
from model.checkpoints.hashing import hash_file
from model.checkpoints.strict_loading import load_strictly
from model.checkpoints.tensors import TensorFiles


@pytest.mark.parametrize("size", [0, 1, 64, 65, 1000])
def test_a_file_of_one_block_has_its_sha256_and_a_longer_one_that_of_its_blocks(
    size: int, tmp_path: Path
) -> None:
    content = bytes(offset % 251 for offset in range(size))
    (tmp_path / "file").write_bytes(content)
    blocks = [content[start : start + 64] for start in range(0, max(size, 1), 64)]
    digests = [hashlib.sha256(block).digest() for block in blocks]
    expected = digests[0] if len(blocks) == 1 else hashlib.sha256(b"".join(digests)).digest()
    assert hash_file(tmp_path / "file", block_bytes=64, read_bytes=24) == expected.hex()


def test_weights_in_their_final_type_stay_a_view_of_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4), "b": torch.arange(3)}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    same, cast = files.read(dtype=torch.float32), files.read(dtype=torch.bfloat16)
    assert (cast["a"].dtype, cast["b"].dtype) == (torch.bfloat16, torch.int64)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    mapped = [line.split()[0].split("-") for line in maps.splitlines() if line.endswith("model.safetensors")]
    address = same["a"].data_ptr()
    assert any(int(start, 16) <= address < int(end, 16) for start, end in mapped)


def test_a_tensor_of_another_kind_of_number_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'weight' is of type torch.int64, torch.float32 is needed"):
        load_strictly(nn.Linear(2, 2, bias=False), {"weight": torch.ones(2, 2).long()}, source=Path("file"))
