"""In bfloat16 the embedded model answers as in float32."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import Blip2
from model.checkpoints import LoadOptions
from training.tiny.gates.generation import PromptedGenerator
from training.tiny.gates.plan import GatePlan, prepare_pixels
from training.world.scenes import Scene

PLAN = GatePlan(Path(), num_scenes=100)  # five questions each


def read(blip2: Blip2, scenes: Sequence[Scene]) -> Tensor:
    image_features = blip2.encode_images(prepare_pixels(scenes, blip2.preprocess))
    return blip2.project_queries(blip2.encode_queries(image_features))


@torch.inference_mode()
def answers(dtype: torch.dtype, qformer_dtype: torch.dtype) -> list[str]:
    blip2 = Blip2.from_pretrained("tiny", LoadOptions(dtype=dtype))
    if qformer_dtype != torch.float32:
        blip2.pack(qformer_dtype)
    speaker = PromptedGenerator(blip2.require_language_model(), blip2.prompts, partial(read, blip2))
    scenes = PLAN.scenes("unseen")
    asked = [[item.question for item in row] for row in PLAN.questions(scenes)]
    return [answer.text for row in speaker.answer(scenes, asked) for answer in row]


@pytest.mark.slow
def test_of_500_answers_one_in_a_hundred_at_most_is_another_than_in_float32() -> None:
    exact = answers(torch.float32, torch.float32)
    assert len(exact) == 500
    for qformer_dtype in (torch.float32, torch.bfloat16):
        rounded = answers(torch.bfloat16, qformer_dtype)
        assert sum(one == other for one, other in zip(exact, rounded, strict=True)) >= 495
