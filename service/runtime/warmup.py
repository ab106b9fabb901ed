"""Warm-up: a self-test, then the largest steps; the longest one sets the default stall time-out."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from model import GenerationParams
from service.engine.request import (
    Answer,
    AnyRequest,
    GenerateInput,
    Generations,
    Matches,
    MatchInput,
    Mode,
    Request,
)
from service.engine.request_queue import RequestQueue
from service.errors import LostRequestError, NotReadyError, ServiceError
from service.model_backend import Backend, EncoderId
from service.runtime.largest_steps import largest_pairs_request, largest_prompts_request, warmup_images

logger = logging.getLogger(__name__)


class SelfTestError(Exception):
    """The model gave no finite score, or none at all; the service must not become ready."""


async def warm_up(
    backend: Backend, queue: RequestQueue, start_engine: Callable[[], None], *, max_rows: int
) -> None:
    """Run every task of the model on a full batch of images, then the largest steps the scheduler makes.

    The results of the first are checked. Raises SelfTestError where the model fails, or gives a score that is
    not finite.
    """
    captions = _caption_requests(backend) if backend.can_generate else []
    matches = [_match_request(backend)] if backend.can_match else []
    requests: list[AnyRequest] = [*captions, *matches]
    answers = [_submit(queue, request) for request in requests]
    start_engine()  # only now, so that they share their first step
    try:
        await asyncio.gather(*answers)
    except ServiceError as exc:
        raise SelfTestError(f"the self-test failed: {exc}; check the weights and BLIP2_DTYPE") from exc
    if any(not request.future.result().value[0][0].text for request in captions):
        logger.warning("the self-test gave an empty caption")
    await _run_largest_steps(backend, queue, max_rows)


async def _run_largest_steps(backend: Backend, queue: RequestQueue, max_rows: int) -> None:
    """Run them one after the other; one that does not fit into the memory has taught its smaller size.

    Raises SelfTestError where the engine did not survive one.
    """
    requests: list[AnyRequest] = []
    if backend.can_match:
        requests.append(largest_pairs_request(backend))
    if backend.can_generate:
        requests.append(largest_prompts_request(backend, max_rows))
    for request in requests:
        try:
            await _submit(queue, request)
        except (NotReadyError, LostRequestError) as exc:
            raise SelfTestError(f"the self-test failed: {exc}") from exc
        except ServiceError as exc:
            logger.warning("a step of the largest size failed at warm-up: %s", exc)


def _submit(queue: RequestQueue, request: AnyRequest) -> asyncio.Future[Answer[Any]]:
    (reservation,) = queue.make_reservations(0)  # whatever the limit of the queue is
    reservation.submit(request)
    return asyncio.wrap_future(request.future)


def _caption_requests(backend: Backend) -> list[Request[Generations]]:
    params = GenerationParams()
    prompt = backend.caption_prompt()
    prompts = (backend.tokenize_prompt(prompt, params),)
    questions = (prompt,) if backend.is_question_conditioned else ()
    images = warmup_images(backend, EncoderId.MAIN)
    return [Request(GenerateInput(image, prompts, params, questions)) for image in images]


def _match_request(backend: Backend) -> Request[Matches]:
    images = warmup_images(backend, backend.matching_encoder)
    count = len(images)
    return Request(MatchInput("a photo", images, Mode.RERANK, rerank_k=count, top_k=count))
