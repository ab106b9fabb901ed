"""Tests that need a CUDA device; run with `pytest -m gpu` where there is one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model import Blip2, Generation, GenerationParams
from model.checkpoints import LoadOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device; run `pytest -m gpu` on a machine with one"
    ),
]

PARAMS = GenerationParams(num_beams=5, num_return_sequences=5, max_new_tokens=8)
PROMPTS = ["", "what color is the circle ?", "a big red"]


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution


def load(checkpoint: Path, device: str) -> Blip2:
    return Blip2.from_pretrained(str(checkpoint), LoadOptions(device=torch.device(device)))


def answers(blip2: Blip2) -> list[tuple[Generation, ...]]:
    torch.manual_seed(0)
    pixel_values = torch.randn(len(PROMPTS), 3, blip2.image_size, blip2.image_size)
    with torch.inference_mode():
        query_output = blip2.encode_queries(blip2.encode_images(pixel_values))
        return blip2.generate(blip2.project_queries(query_output), PROMPTS, PARAMS)


def test_a_gpu_gives_the_answers_of_a_cpu(random_checkpoint: Path) -> None:
    for on_cpu, on_gpu in zip(
        answers(load(random_checkpoint, "cpu")), answers(load(random_checkpoint, "cuda")), strict=True
    ):
        assert [answer.token_ids for answer in on_gpu] == [answer.token_ids for answer in on_cpu]
        assert [answer.score for answer in on_gpu] == pytest.approx(
            [answer.score for answer in on_cpu], abs=1e-4
        )


def test_matching_on_a_gpu_gives_the_logits_of_a_cpu(random_checkpoint: Path) -> None:
    texts = ["a red circle", "a blue star and a big green cross"]
    logits = []
    for device in ("cpu", "cuda"):
        blip2 = load(random_checkpoint, device)
        assert blip2.matcher is not None
        torch.manual_seed(0)
        pixel_values = torch.randn(2, 3, blip2.image_size, blip2.image_size)
        with torch.inference_mode():
            features = blip2.encode_images(pixel_values)
            logits.append(blip2.matcher.match_logits(features, *blip2.matcher.tokenize(texts)).cpu())
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)


def test_laid_over_a_gpu_and_the_cpu_it_answers_as_on_one_device(
    random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerate = pytest.importorskip("accelerate", reason="no accelerate; install the extra 'spread'")

    def lay_out(llm: Any, **_: object) -> dict[str, str]:
        ends = {name: "cuda:0" for name, _ in llm.model.decoder.named_children() if name != "layers"}
        layers = {f"layers.{at}": ("cuda:0", "cpu")[at % 2] for at in range(len(llm.model.decoder.layers))}
        device_map = {f"model.decoder.{name}": device for name, device in (ends | layers).items()}
        return device_map | {"lm_head": "cuda:0"}

    monkeypatch.setattr(accelerate, "infer_auto_device_map", lay_out)
    expected = answers(load(random_checkpoint, "cpu"))
    options = LoadOptions(device=torch.device("cuda"), spread=True)
    spread = Blip2.from_pretrained(str(random_checkpoint), options)
    assert spread.language_model is not None
    assert set(spread.language_model.llm.hf_device_map.values()) == {"cuda:0", "cpu"}
    assert [one[0].token_ids for one in answers(spread)] == [one[0].token_ids for one in expected]
