"""A real small checkpoint behind the engine: batched answers are those of the model alone."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import (
    Blip2,
    DecoderLimits,
    Generation,
    GenerationParams,
    InvalidParamsError,
    InvalidPromptError,
)
from service.blip2_backend import Blip2Backend
from service.cache.lru import LruTier
from service.engine.engine import Engine
from service.engine.image_pool import ImageInput
from service.engine.request import AnyRequest, GenerateInput, Generations, Matches, MatchInput, Mode, Request
from service.engine.request_queue import RequestQueue, Throughput
from service.runtime.loading import load_backend
from service.runtime.metrics import Metrics
from service.runtime.settings import Settings, SettingsError
from tests.builders import random_images
from tests.service.fakes import TIMEOUT_S

NUM_IMAGES = 6
PROMPTS = ("a photo of", "question : how many stars ? answer :", "")
VARIANTS = (
    GenerationParams(),
    GenerationParams(num_beams=1, max_new_tokens=12),
    GenerationParams(num_beams=3, num_return_sequences=3, length_penalty=-1.0, max_new_tokens=10),
    GenerationParams(num_beams=1, do_sample=True, num_return_sequences=2, seed=3, temperature=1.5),
    GenerationParams(num_beams=4, repetition_penalty=1.4, no_repeat_ngram_size=2, min_new_tokens=5),
)
TEXTS = ("a red circle", "two blue stars", "a big green square above a cross")


@pytest.fixture(scope="module")
def backend(random_checkpoint: Path) -> Blip2Backend:
    return load_backend(Settings(model=str(random_checkpoint), device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def blip2(random_checkpoint: Path) -> Blip2:
    return Blip2.from_pretrained(str(random_checkpoint))


def image(index: int) -> ImageInput:
    return ImageInput(str(index), random_images(NUM_IMAGES)[index], {})


def pixel_values(blip2: Blip2) -> Tensor:
    return blip2.preprocess.normalise(random_images(NUM_IMAGES))


def serve(backend: Blip2Backend, requests: list[AnyRequest]) -> None:
    """Run all requests together, from the first step on."""
    throughput = Throughput()
    queue = RequestQueue(100, throughput)
    memory = LruTier(0)
    engine = Engine(
        backend,
        queue,
        memory,
        throughput=throughput,
        metrics=Metrics(),
        max_rows=40,
        max_kv_bytes=2**40,
    )
    for request in requests:
        queue.make_reservations(1)[0].submit(request)
    engine.start()
    for request in requests:
        request.future.exception(TIMEOUT_S)
    engine.stop(TIMEOUT_S)


def alone(blip2: Blip2, index: int, prompt: str, params: GenerationParams) -> tuple[Generation, ...]:
    with torch.inference_mode():
        image_features = blip2.encode_images(pixel_values(blip2)[index : index + 1])
        inputs = blip2.project_queries(blip2.encode_queries(image_features))
        return blip2.generate(inputs, [prompt], params)[0]


def test_requests_of_all_kinds_together_are_answered_as_alone(backend: Blip2Backend, blip2: Blip2) -> None:
    asked = [
        (index, prompt, params)
        for number, params in enumerate(VARIANTS)
        for index, prompt in ((number % NUM_IMAGES, PROMPTS[number % 3]), (5 - number, PROMPTS[2]))
    ]
    requests: list[Request[Generations]] = [
        Request(GenerateInput(image(index), (backend.tokenize_prompt(prompt, params),), params))
        for index, prompt, params in asked
    ]
    matching: Request[Matches] = Request(
        MatchInput(TEXTS[0], tuple(image(index) for index in range(NUM_IMAGES)), Mode.ITM, 128, 10)
    )
    serve(backend, [*requests, matching])
    for request, (index, prompt, params) in zip(requests, asked, strict=True):
        together = request.future.result().value[0]
        expected = alone(blip2, index, prompt, params)
        assert [one.token_ids for one in together] == [one.token_ids for one in expected]
        assert [one.score for one in together] == pytest.approx([one.score for one in expected], abs=1e-4)
    assert len(matching.future.result().value) == NUM_IMAGES


def test_matches_are_those_of_the_matcher_alone(backend: Blip2Backend, blip2: Blip2) -> None:
    candidates = tuple(image(at) for at in range(NUM_IMAGES))
    requests: list[Request[Matches]] = [
        Request(MatchInput(text, candidates, Mode.RERANK, 128, 10)) for text in TEXTS
    ]
    serve(backend, list(requests))
    matcher = blip2.matcher
    assert matcher is not None
    for request, text in zip(requests, TEXTS, strict=True):
        with torch.inference_mode():
            ids_and_mask = matcher.tokenize([text])
            image_features = blip2.encode_images(pixel_values(blip2))
            queries = matcher.encode_image_queries(image_features).query_output
            itc = matcher.itc_scores(matcher.image_embeds(queries), matcher.text_embeds(*ids_and_mask))[:, 0]
            ids, mask = (tensor.expand(NUM_IMAGES, -1) for tensor in ids_and_mask)
            logits = matcher.match_logits(image_features, ids, mask)
        matches = {match.index: match for match in request.future.result().value}
        for at in range(NUM_IMAGES):
            assert matches[at].itc == pytest.approx(itc[at].item(), abs=1e-5)
            assert matches[at].score == pytest.approx((logits[at, 1] + itc[at]).item(), abs=1e-4)
            assert matches[at].itm_probability == pytest.approx(logits[at].softmax(0)[1].item(), abs=1e-4)


def test_a_prompt_that_leaves_no_room_for_the_answer_is_refused(backend: Blip2Backend) -> None:
    backend.tokenize_prompt("a " * 50, GenerationParams())
    with pytest.raises(InvalidPromptError, match="96"):
        backend.tokenize_prompt("a " * 60, GenerationParams())


def test_a_text_whose_keys_and_values_could_never_fit_is_refused_before_the_queue(blip2: Blip2) -> None:
    backend = Blip2Backend(blip2, limits=DecoderLimits(max_kv_bytes=2**15))
    backend.tokenize_prompt("a photo", GenerationParams(num_beams=1, max_new_tokens=4))
    with pytest.raises(InvalidParamsError, match=r"16 beams of up to 30 new.*the limit is 32768; lower"):
        backend.tokenize_prompt("a photo", GenerationParams(num_beams=16))


def test_a_template_of_the_callers_takes_the_reservation_of_the_checkpoints(backend: Blip2Backend) -> None:
    assert backend.question_prompt("why", [("what", "that")], "Q: {}?") == "Q: what? that. Q: why?"
    assert backend.question_prompt("why", [], None) == "question : why ? answer :"
    with pytest.raises(InvalidPromptError):
        backend.question_prompt("why", [], "no place")
    assert backend.question_prompt("{0.__class__}", [], "Q: {}") == "Q: {0.__class__}"


def test_a_retrieval_checkpoint_matches_and_does_not_generate(random_checkpoint: Path) -> None:
    backend = load_backend(Settings(model=str(random_checkpoint.parent / "stage1"), device="cpu"))
    assert (backend.can_generate, backend.can_match) == (False, True)
    assert backend.embed_texts(["a red circle"]).shape == (1, 16)


def test_the_fingerprint_tells_types_apart(random_checkpoint: Path) -> None:
    settings = [
        Settings(model=str(random_checkpoint), device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16")
    ]
    first, second = (load_backend(one) for one in settings)
    assert (first.dtype, second.dtype) == ("float32", "bfloat16")
    assert first.fingerprint != second.fingerprint


def test_spreading_over_no_gpu_is_a_wrong_setting(random_checkpoint: Path) -> None:
    with pytest.raises(SettingsError, match=r"BLIP2_SPREAD lays .* the device is 'cpu'; unset it"):
        load_backend(Settings(model=str(random_checkpoint), device="cpu", spread=True))


@pytest.mark.parametrize("device", ["cuda:63", "mps"])
def test_a_device_that_is_not_there_is_a_wrong_setting(random_checkpoint: Path, device: str) -> None:
    with pytest.raises(SettingsError, match=f"BLIP2_DEVICE: the device is '{device}'.*set it to auto"):
        load_backend(Settings(model=str(random_checkpoint), device=device))
