"""The first turn of the engine: a self-test, made as long as a turn can be, so that its length is known."""

import asyncio
import logging
from collections.abc import Callable, Sequence

from PIL import Image

from model import GenerationParams
from service.engine.encoder_runner import MAX_IMAGES_PER_TURN
from service.engine.request import GenerateJob, ImageInput, Job, MatchJob, Mode, Ticket, Tower
from service.engine.request_queue import Line
from service.errors import ServiceError
from service.model_backend import Backend

logger = logging.getLogger(__name__)


class SelfTestError(Exception):
    """The model's answers are no numbers, or it has none; the service must not become ready."""


async def warm_up(backend: Backend, line: Line, start_engine: Callable[[], None]) -> None:
    """Has the engine do all it can do on a full batch of images, and looks at what comes out.

    Raises SelfTestError where the model fails, or gives a score that is not finite.
    """
    captions = _caption_jobs(backend, _warm_images(backend, Tower.MAIN)) if backend.can_generate else []
    jobs: list[Job] = list(captions)
    if backend.can_match:
        jobs.append(_match_job(_warm_images(backend, backend.matching_tower)))
    for job in jobs:
        (place,) = line.reserve(0)  # whatever the limit of the line is
        place.put(job)
    start_engine()  # only now, so that they share their first turn
    try:
        await asyncio.gather(*(asyncio.wrap_future(job.ticket.future) for job in jobs))
    except ServiceError as exc:
        raise SelfTestError(f"the self-test failed: {exc}; check the weights and BLIP2_DTYPE") from exc
    if any(not job.ticket.future.result().value[0][0].text for job in captions):
        logger.warning("the self-test gave an empty caption")


def _warm_images(backend: Backend, tower: Tower) -> list[ImageInput]:
    shades = [255 * index // MAX_IMAGES_PER_TURN for index in range(MAX_IMAGES_PER_TURN)]
    pictures = [Image.new("RGB", (64, 64), (shade, 128, 255 - shade)) for shade in shades]
    return [
        ImageInput(f"warm-up-{tower}-{index}", backend.preprocess(picture, tower), {}, tower)
        for index, picture in enumerate(pictures)
    ]


def _caption_jobs(backend: Backend, images: Sequence[ImageInput]) -> list[GenerateJob]:
    params = GenerationParams()
    prompt = backend.caption_prompt()
    prompt_ids = backend.tokenize_prompt(prompt, params)
    questions = (prompt,) if backend.shows_questions else ()
    return [GenerateJob(image, (prompt_ids,), params, Ticket(), questions) for image in images]


def _match_job(images: Sequence[ImageInput]) -> MatchJob:
    count = len(images)
    return MatchJob("a photo", tuple(images), Mode.RERANK, rerank_k=count, top_k=count, ticket=Ticket())
