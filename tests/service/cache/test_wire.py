"""Tensors as bytes: exact there and back, and nothing else is taken for one."""

import itertools

import pytest
import torch

from model import EmbeddingKind
from service.cache.wire import WireError, pack, redis_key, unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3,), (4, 5), (2, 3, 4)])
def test_a_tensor_comes_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    back = unpack("key", pack("key", tensor))
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


def test_a_tensor_of_the_engine_comes_back_too() -> None:
    with torch.inference_mode():
        tensor = torch.randn(8, 6).T[1:3].to(torch.bfloat16)  # not contiguous
    assert torch.equal(unpack("key", pack("key", tensor)), tensor)


def test_every_flipped_bit_is_noticed() -> None:
    data = pack("key", torch.ones(3))
    for index, bit in itertools.product(range(len(data)), range(8)):
        damaged = bytearray(data)
        damaged[index] ^= 1 << bit
        with pytest.raises(WireError):
            unpack("key", bytes(damaged))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"BL2E",
        pack("key", torch.ones(3))[:-1],
        pack("key", torch.ones(3)) + b"\0",
        b"\x80\x04K\x01." * 20,
    ],
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        unpack("key", data)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 0, 4)])
def test_a_tensor_without_elements_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(WireError):
        unpack("key", pack("key", torch.zeros(shape)))


def test_the_value_of_another_key_is_refused() -> None:
    data = pack("one", torch.ones(3))
    assert unpack("one", data).tolist() == [1, 1, 1]
    with pytest.raises(WireError, match="checksum"):
        unpack("other", data)


def test_the_key_changes_with_each_of_its_fields() -> None:
    fields = {
        "digest": "d",
        "fingerprint": "f",
        "preprocess_version": "1",
        "kind": EmbeddingKind.QUERY_OUTPUT,
    }
    others = {
        "digest": "e",
        "fingerprint": "g",
        "preprocess_version": "2",
        "kind": EmbeddingKind.IMAGE_EMBEDS,
    }
    keys = {redis_key(**fields)} | {redis_key(**{**fields, name: value}) for name, value in others.items()}  # type: ignore[arg-type]
    assert len(keys) == 5


def test_fields_that_join_alike_have_different_keys() -> None:
    first = redis_key(digest="ab", fingerprint="c", preprocess_version="1", kind=EmbeddingKind.QUERY_OUTPUT)
    second = redis_key(digest="a", fingerprint="bc", preprocess_version="1", kind=EmbeddingKind.QUERY_OUTPUT)
    assert first != second
