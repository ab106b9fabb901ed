"""Models of both families, which end their answers early, late and in between."""

from functools import partial

import pytest
import torch
from transformers import Blip2ForConditionalGeneration

from model import Blip2, DecodeRequest
from model.checkpoints import save_hub
from tests.builders import build_components, random_pixels
from tests.builders_t5 import build_t5_components
from tests.model.generation.mixed_requests import PARAMS
from tests.model.generation.reference import PROMPTS, Pair

BUILDERS = {
    "even": partial(build_components, seed=0, eos_pull=1.5),
    "terse": partial(build_components, seed=1, eos_pull=1.6),
    "wordy": partial(build_components, seed=2, eos_pull=1.6),
    "tied T5": partial(build_t5_components, "tied", seed=3),
    "untied T5": partial(build_t5_components, "untied", seed=2),
}


@pytest.fixture(scope="session", params=BUILDERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    blip2 = Blip2(BUILDERS[request.param]()).eval()
    directory = tmp_path_factory.mktemp("reference")
    save_hub(directory, blip2.components)
    pixel_values = random_pixels(4)
    with torch.inference_mode():
        query_output = blip2.encode_queries(blip2.encode_images(pixel_values))
        language_model_inputs = blip2.project_queries(query_output)
    reference = Blip2ForConditionalGeneration.from_pretrained(directory).eval()
    return Pair(blip2, reference, pixel_values, language_model_inputs)


@pytest.fixture
def requests(pair: Pair) -> list[DecodeRequest]:
    """Return every parameter set with every prompt, on different images."""
    return [
        pair.request((number + offset) % 4, prompt, params)
        for number, params in enumerate(PARAMS)
        for offset, prompt in enumerate(PROMPTS)
    ]
