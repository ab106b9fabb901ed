"""Types and devices of the frozen models: automatic types, 8 bits, several devices."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from model import Blip2, CheckpointError, GenerationParams
from model.checkpoints import LoadOptions, Quantization
from model.devices import find_device
from model.errors import DeviceUnavailableError
from service.runtime.settings import Settings
from tests.builders import random_pixels

PARAMS = GenerationParams(num_beams=4, max_new_tokens=8)
PROMPTS = ("", "a photo of", "is there a big star ?")
HALVES = (torch.float16, torch.bfloat16)
needs_torchao = pytest.mark.skipif(
    find_spec("torchao") is None, reason="no torchao; install the extra 'quantize', then `pytest -m int8`"
)


def answers(blip2: Blip2) -> list[str]:
    with torch.inference_mode():
        inputs = blip2.project_queries(blip2.encode_queries(blip2.encode_images(random_pixels(3))))
    return [best.text for best, *_ in blip2.generate(inputs, PROMPTS, PARAMS)]


@pytest.mark.parametrize(
    ("device", "has_bfloat16", "has_amx", "expected"),
    [
        ("cuda", True, False, (torch.float16, torch.bfloat16)),
        ("cuda", False, False, (torch.float16, torch.float32)),
        ("cpu", False, True, (torch.bfloat16, torch.bfloat16)),
        ("cpu", False, False, (torch.float32, torch.float32)),
        ("mps", False, False, (torch.float32, torch.float32)),
    ],
)
def test_the_type_is_the_one_its_authors_ran_or_one_that_the_hardware_has(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    has_bfloat16: bool,
    has_amx: bool,
    expected: tuple[torch.dtype, torch.dtype],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    options = LoadOptions(device=torch.device(device), dtype=None)
    assert tuple(options.pick_dtype(half) for half in HALVES) == expected
    explicit = LoadOptions(device=torch.device(device), dtype=torch.float32)
    assert [explicit.pick_dtype(half) for half in HALVES] == [torch.float32] * 2


def test_without_a_type_a_checkpoint_loads_in_the_one_that_is_picked(
    random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    blip2 = Blip2.from_pretrained(str(random_checkpoint), LoadOptions(dtype=None))
    assert blip2.language_model is not None
    assert (blip2.vision_model.dtype, blip2.language_model.dtype) == (torch.bfloat16, torch.bfloat16)
    assert {weight.dtype for weight in blip2.qformer.parameters()} == {torch.float32}


def test_a_device_that_is_not_there_is_refused_with_the_cure() -> None:
    assert find_device("auto") in (torch.device("cuda"), torch.device("cpu"))
    with pytest.raises(DeviceUnavailableError, match=r"'cuda:63'.*set it to auto"):
        find_device("cuda:63")
    for nonsense in ("gpu", "cuda:", "cuda:one", ""):
        with pytest.raises(DeviceUnavailableError, match="it must be auto, cpu, cuda, cuda:N or mps"):
            find_device(nonsense)


def test_spread_over_whatever_there_is_answers_as_on_one_device(random_checkpoint: Path) -> None:
    spread = Blip2.from_pretrained(str(random_checkpoint), LoadOptions(spread=True))
    assert answers(spread) == answers(Blip2.from_pretrained(str(random_checkpoint)))


@pytest.mark.parametrize(
    ("options", "package", "extra"),
    [
        (LoadOptions(spread=True), "accelerate", "spread"),
        (LoadOptions(quantize="int8"), "torchao.quantization", "quantize"),
    ],
)
def test_a_library_that_is_not_installed_is_named_with_its_extra(
    random_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: LoadOptions,
    package: str,
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CheckpointError, match=rf"pip install 'blip2-server\[{extra}\]'"):
        Blip2.from_pretrained(str(random_checkpoint), options)


@needs_torchao
@pytest.mark.int8
@pytest.mark.parametrize("name", ["tiny", "tiny-t5"])
def test_int8_holds_linear_layers_in_8_bits_and_hardly_changes_what_is_said(name: str) -> None:
    whole, small = (Blip2.from_pretrained(name, LoadOptions(quantize=each)) for each in ("none", "int8"))
    assert whole.language_model is not None
    assert small.language_model is not None
    llm = small.language_model.llm
    linear = [module for module in llm.modules() if isinstance(module, nn.Linear)]
    quantised = [module for module in linear if "Int8" in type(module.weight).__name__]
    assert len(quantised) == len(linear) - 1  # but for the head
    assert whole.fingerprint != small.fingerprint
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, whole.image_size, whole.image_size)
    with torch.inference_mode():
        inputs = whole.project_queries(whole.encode_queries(whole.encode_images(pixels)))
        ids = whole.language_model.tokenize("question : how many stars are there ? answer :")
        expected, _ = whole.language_model.prefill([inputs[0]], [ids])
        found, _ = small.language_model.prefill([inputs[0]], [ids])
    largest = (found.softmax(-1) - expected.softmax(-1)).abs().max()
    assert 0 < largest < 0.05


def test_quantization_names_are_those_of_the_settings() -> None:
    assert get_args(Settings.model_fields["quantize"].annotation) == get_args(Quantization)
    assert get_args(Quantization) == ("none", "int8")
