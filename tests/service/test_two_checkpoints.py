"""One checkpoint answers in words, another matches; their image encoder is one where it is equal."""

import gc
import weakref
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from model import Blip2, GenerationParams
from model.checkpoints import save_hub, save_retrieval_adapter
from model.images.resize import resize_to_square
from service.blip2_backend import Blip2Backend
from service.engine.image_pool import ImageInput
from service.engine.request import GenerateInput, Generations, Matches, MatchInput, Mode, Request
from service.model_backend import EncoderId
from service.runtime.loading import load_backend
from service.runtime.settings import Settings, SettingsError
from tests.builders import build_components, build_matcher, build_vision_model, random_picture
from tests.service.fakes import TIMEOUT_S, FakeBackend, pixels, png
from tests.service.running import running_engine, site, text_of
from tests.service.runtime.test_loading import serve

Dtype = Literal["float32", "bfloat16"]
PICTURES = [random_picture(seed) for seed in range(3)]
GREEDY = GenerationParams(num_beams=1, max_new_tokens=8)


def save_generation(directory: Path) -> str:
    save_hub(directory, build_components(seed=0))
    return str(directory)


def save_retrieval(directory: Path, *, seed: int, image_size: int = 32) -> str:
    """A retrieval adapter on an encoder of this seed: that of `save_generation` is made of seed 0."""
    parts = build_components(seed=seed)
    vision_model = build_vision_model(seed=seed)
    vision_model.resize(image_size)
    vision_model.vit.save_pretrained(directory / "vision_model")
    parts.preprocess.image_size = image_size
    save_retrieval_adapter(
        directory / "stage1",
        build_matcher(seed=9),
        parts.preprocess,
        vision_directory=directory / "vision_model",
    )
    return str(directory / "stage1")


def load(generation: str, retrieval: str, *, dtype: Dtype = "float32") -> Blip2Backend:
    return load_backend(Settings(model=generation, retrieval_model=retrieval, device="cpu", dtype=dtype))


def resized(picture: Image.Image, side: int) -> Tensor:
    return torch.from_numpy(np.array(resize_to_square(picture, side)))


def inputs(backend: Blip2Backend, encoder: EncoderId) -> list[ImageInput]:
    return [
        ImageInput(f"{index}:{encoder}", resized(picture, backend.image_size(encoder)), {}, encoder)
        for index, picture in enumerate(PICTURES)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_encoders_are_held_once_and_each_checkpoint_keeps_its_own_norm(
    tmp_path: Path, dtype: Dtype
) -> None:
    backend = load(save_generation(tmp_path / "a"), save_retrieval(tmp_path / "b", seed=0), dtype=dtype)
    assert backend.matching_encoder is EncoderId.MAIN
    models = (backend.generating_model, backend.matching_model)
    assert models[0].vision_model is models[1].vision_model
    assert models[0].ln_vision is not models[1].ln_vision
    assert backend.can_generate
    assert backend.can_match


@pytest.mark.parametrize(("seed", "image_size"), [(0, 32), (1, 32), (0, 48)])
def test_both_answer_as_they_do_alone(tmp_path: Path, seed: int, image_size: int) -> None:
    generation = save_generation(tmp_path / "a")
    retrieval = save_retrieval(tmp_path / "b", seed=seed, image_size=image_size)
    backend = load(generation, retrieval)
    is_shared = (seed, image_size) == (0, 32)
    assert (backend.matching_encoder is EncoderId.MAIN) == is_shared
    prompt_ids = backend.tokenize_prompt("a photo of", GenerationParams(max_new_tokens=8))
    captions = [
        Request[Generations](GenerateInput(image, (prompt_ids,), GREEDY))
        for image in inputs(backend, EncoderId.MAIN)
    ]
    images = tuple(inputs(backend, backend.matching_encoder))
    match: Request[Matches] = Request(MatchInput("a red circle", images, Mode.ITM, 128, 10))
    serve(backend, [captions[0], match, *captions[1:]])

    first, second = Blip2.from_pretrained(generation), Blip2.from_pretrained(retrieval)
    assert second.matcher is not None
    with torch.inference_mode():
        pixels = torch.stack([first.preprocess(picture) for picture in PICTURES])
        queries = first.encode_queries(first.encode_images(pixels))
        expected = first.generate(first.project_queries(queries), ["a photo of"] * len(PICTURES), GREEDY)
        features = second.encode_images(torch.stack([second.preprocess(picture) for picture in PICTURES]))
        tokens = [each.expand(len(PICTURES), -1) for each in second.matcher.tokenize(["a red circle"])]
        probabilities = second.matcher.match_logits(features, *tokens).softmax(dim=1)[:, 1]
    for request, answers in zip(captions, expected, strict=True):
        assert request.future.result().value[0][0].token_ids == answers[0].token_ids
    found = {one.index: one.itm_probability for one in match.future.result().value}
    assert [found[index] for index in range(len(PICTURES))] == pytest.approx(probabilities.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("encoder", "batches"), [(EncoderId.MAIN, [[100]]), (EncoderId.MATCHING, [[100], [100]])], ids=str
)
def test_one_vision_pass_serves_both_where_the_encoder_is_one(
    encoder: EncoderId, batches: list[list[int]]
) -> None:
    with running_engine(started=False) as harness:
        caption = harness.caption(100, image=ImageInput("digest", pixels(100), {}))
        digest = "digest" if encoder is EncoderId.MAIN else "digest:matching"
        match = harness.match("100", ImageInput(digest, pixels(100), {}, encoder), mode=Mode.RERANK)
        harness.engine.start()
        assert text_of(caption) == "100 a photo #0"
        assert match.future.result(TIMEOUT_S).value[0].itc == pytest.approx(1)
    assert harness.backend.vision_batches == batches


async def test_an_encoding_of_one_encoder_is_never_taken_for_the_others() -> None:
    backend = FakeBackend(matching_encoder=EncoderId.MATCHING, matching_name="matcher")
    async with site(backend) as served:
        backend.vision_batches.clear()
        for _ in range(2):
            caption = await served.client.post("/caption", files={"image": png(100)})
            found = await served.client.post(
                "/retrieve", files={"image": png(100)}, data={"candidates": '{"texts": ["100", "200"]}'}
            )
        version = (await served.client.get("/version")).json()
    assert backend.vision_batches == [[100], [100]]  # each encoder once, and the second round from the cache
    assert (caption.json()["model"], found.json()["model"]) == ("fake", "matcher")
    assert (version["model"], version["retrieval_model"]) == ("fake", "matcher")


def test_a_change_of_either_checkpoint_is_a_change_of_the_fingerprint(tmp_path: Path) -> None:
    generation = save_generation(tmp_path / "a")
    fingerprints = {
        load_backend(Settings(model=generation, device="cpu")).fingerprint,
        load(generation, save_retrieval(tmp_path / "b", seed=0)).fingerprint,
        load(generation, save_retrieval(tmp_path / "c", seed=1)).fingerprint,
    }
    assert len(fingerprints) == 3


def test_a_checkpoint_without_heads_cannot_match(tmp_path: Path) -> None:
    generation = save_generation(tmp_path / "a")
    with pytest.raises(SettingsError, match=r"BLIP2_RETRIEVAL_MODEL is .*, which has no ITC and ITM heads"):
        load(generation, generation)


def test_the_image_encoder_that_is_not_used_is_let_go(tmp_path: Path) -> None:
    generation, retrieval = save_generation(tmp_path / "a"), save_retrieval(tmp_path / "b", seed=0)
    main, matching = Blip2.from_pretrained(generation), Blip2.from_pretrained(retrieval)
    spare = weakref.ref(matching.vision_model)
    assert main.share_vision_model(matching)
    gc.collect()
    assert spare() is None
    assert len(matching.fingerprint) == 64
