"""Warm-up: a self-test on a full batch of images; its longest step sets the default stall time-out."""

import asyncio
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from model import GenerationParams
from service.engine.image_pool import ImageInput
from service.engine.request import AnyRequest, GenerateInput, Generations, Matches, MatchInput, Mode, Request
from service.engine.request_queue import RequestQueue
from service.engine.scheduler import MAX_IMAGES_PER_STEP
from service.errors import ServiceError
from service.model_backend import Backend, EncoderId

logger = logging.getLogger(__name__)


class SelfTestError(Exception):
    """The model gave no finite score, or none at all; the service must not become ready."""


async def warm_up(backend: Backend, queue: RequestQueue, start_engine: Callable[[], None]) -> None:
    """Run every task of the model on a full batch of images, and check the results.

    Raises SelfTestError where the model fails, or gives a score that is not finite.
    """
    captions = _caption_requests(backend) if backend.can_generate else []
    matches = [_match_request(backend)] if backend.can_match else []
    requests: list[AnyRequest] = [*captions, *matches]
    for request in requests:
        (reservation,) = queue.make_reservations(0)  # whatever the limit of the queue is
        reservation.submit(request)
    start_engine()  # only now, so that they share their first step
    try:
        await asyncio.gather(*(asyncio.wrap_future(request.future) for request in requests))
    except ServiceError as exc:
        raise SelfTestError(f"the self-test failed: {exc}; check the weights and BLIP2_DTYPE") from exc
    if any(not request.future.result().value[0][0].text for request in captions):
        logger.warning("the self-test gave an empty caption")


def _caption_requests(backend: Backend) -> list[Request[Generations]]:
    params = GenerationParams()
    prompt = backend.caption_prompt()
    prompts = (backend.tokenize_prompt(prompt, params),)
    questions = (prompt,) if backend.is_question_conditioned else ()
    images = _warmup_images(backend, EncoderId.MAIN)
    return [Request(GenerateInput(image, prompts, params, questions)) for image in images]


def _match_request(backend: Backend) -> Request[Matches]:
    images = _warmup_images(backend, backend.matching_encoder)
    count = len(images)
    return Request(MatchInput("a photo", images, Mode.RERANK, rerank_k=count, top_k=count))


def _warmup_images(backend: Backend, encoder: EncoderId) -> tuple[ImageInput, ...]:
    shades = [255 * index // MAX_IMAGES_PER_STEP for index in range(MAX_IMAGES_PER_STEP)]
    side = backend.image_size(encoder)
    return tuple(
        ImageInput(f"warm-up-{encoder}-{index}", _one_colour(shade, 128, 255 - shade, side=side), {}, encoder)
        for index, shade in enumerate(shades)
    )


def _one_colour(*rgb: int, side: int) -> Tensor:
    return torch.tensor(rgb, dtype=torch.uint8).expand(side, side, 3)
