"""Models of three tempers, which end their answers early, late and in between."""

import pytest
import torch
from transformers import Blip2ForConditionalGeneration

from model import Blip2
from model.checkpoints import save_hub
from tests.builders import build_parts, random_pixels
from tests.model.decoding.reference import Pair


@pytest.fixture(scope="session", params=[(0, 1.5), (1, 2.5), (2, 1.3)], ids=["even", "terse", "wordy"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    seed, eos_pull = request.param
    blip2 = Blip2(build_parts(seed=seed, eos_pull=eos_pull)).eval()
    directory = tmp_path_factory.mktemp("reference")
    save_hub(directory, blip2.parts)
    pixel_values = random_pixels(4, seed=seed)
    with torch.inference_mode():
        query_output = blip2.encode_queries(blip2.encode_images(pixel_values))
        language_model_inputs = blip2.project_queries(query_output)
    reference = Blip2ForConditionalGeneration.from_pretrained(directory).eval()
    return Pair(blip2, reference, pixel_values, language_model_inputs)
