"""A real small checkpoint with a T5 behind the application: its answers are those of the model alone."""

import io
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from model import Blip2, CheckpointError, Generation, GenerationParams
from service.blip2_backend import Blip2Backend
from service.runtime.loading import load_backend
from service.runtime.settings import Settings
from tests.builders import MAX_POSITIONS, NUM_QUERY_TOKENS
from tests.builders_t5 import save_random_t5_checkpoint
from tests.service.fakes import png, png_base64
from tests.service.running import site

RED = 200
QUESTIONS = ("what color is the circle ?", "how many ?", "is there a big star left of the small square ?")
CAPTION = GenerationParams(num_beams=5, num_return_sequences=2, max_new_tokens=12)
ANSWER = GenerationParams(num_beams=5, max_new_tokens=10, length_penalty=-1.0)


@pytest.fixture(scope="module", params=["tied", "untied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_t5_checkpoint(tmp_path_factory.mktemp("t5"), request.param)


@pytest.fixture
def backend(checkpoint: Path) -> Blip2Backend:
    return load_backend(Settings(model=str(checkpoint), device="cpu", dtype="float32"))


def alone(checkpoint: Path, prompts: Sequence[str], params: GenerationParams) -> list[tuple[Generation, ...]]:
    """Generate with the model alone, for each prompt about the image of the requests."""
    blip2 = Blip2.from_pretrained(str(checkpoint))
    pixel_values = blip2.preprocess(Image.open(io.BytesIO(png(RED))))[None]
    with torch.inference_mode():
        query_output = blip2.encode_queries(blip2.encode_images(pixel_values))
        soft_tokens = blip2.project_queries(query_output)
        return [blip2.generate(soft_tokens, [prompt], params)[0] for prompt in prompts]


async def test_captions_are_those_of_the_model_alone(checkpoint: Path, backend: Blip2Backend) -> None:
    body = {"image": png_base64(RED), "prompt": "a photo of", "num_captions": 2, "max_new_tokens": 12}
    async with site(backend) as running:
        response = await running.client.post("/caption", json=body)
    assert response.status_code == 200, response.text
    captions = response.json()["captions"]
    (expected,) = alone(checkpoint, ["a photo of"], CAPTION)
    assert [(caption["text"], caption["num_tokens"], caption["finish_reason"]) for caption in captions] == [
        (one.text, one.num_tokens, one.finish_reason) for one in expected
    ]
    assert [caption["score"] for caption in captions] == pytest.approx(
        [one.score for one in expected], abs=1e-4
    )


async def test_questions_are_asked_for_short_answers_and_answered_as_by_the_model_alone(
    checkpoint: Path, backend: Blip2Backend
) -> None:
    async with site(backend) as running:
        response = await running.client.post("/vqa", json={"image": png_base64(RED), "question": QUESTIONS})
    assert response.status_code == 200, response.text
    answers = response.json()["answers"]
    prompts = [f"Question: {question} Short answer:" for question in QUESTIONS]
    expected = [best for (best,) in alone(checkpoint, prompts, ANSWER)]
    assert [answer["answer"] for answer in answers] == [one.text for one in expected]
    assert [answer["score"] for answer in answers] == pytest.approx([one.score for one in expected], abs=1e-4)


async def test_prompt_and_answer_may_be_longer_than_the_positions_it_was_trained_with(
    checkpoint: Path, backend: Blip2Backend
) -> None:
    prompt, num_tokens = "a photo of " * 60, MAX_POSITIONS + 1
    body = {
        "image": png_base64(RED),
        "prompt": prompt,
        "max_new_tokens": num_tokens,
        "min_new_tokens": num_tokens,
        "num_captions": 1,
    }
    async with site(backend) as running:
        response = await running.client.post("/caption", json=body)
    assert response.status_code == 200, response.text
    params = GenerationParams(num_beams=5, max_new_tokens=num_tokens, min_new_tokens=num_tokens)
    ((expected,),) = alone(checkpoint, [prompt], params)
    assert [caption["text"] for caption in response.json()["captions"]] == [expected.text]


async def test_a_prompt_longer_than_the_limit_is_refused(checkpoint: Path) -> None:
    backend = load_backend(
        Settings(model=str(checkpoint), device="cpu", dtype="float32", max_prompt_tokens=64)
    )
    num_words = 64 - NUM_QUERY_TOKENS - 1  # the end token is the last
    requests = [{"image": png_base64(RED), "prompt": "a " * num} for num in (num_words, num_words + 1)]
    async with site(backend) as running:
        responses = [await running.client.post("/caption", json=body) for body in requests]
    assert [response.status_code for response in responses] == [200, 422]
    assert "65 tokens, the limit is 64; shorten the prompt, or raise" in responses[1].json()["detail"]


def test_a_service_asked_for_float16_does_not_start_on_a_t5(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="load it in bfloat16 or float32"):
        load_backend(Settings(model=str(checkpoint), device="cpu", dtype="float16"))
