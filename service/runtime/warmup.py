"""Warm-up: a self-test, then the largest steps; the longest one sets the default stall time-out."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Final

from model import GenerationParams
from service.engine.engine import Engine
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
from service.runtime.largest_steps import (
    LARGEST,
    REDUCED,
    StepSizes,
    largest_pairs_request,
    largest_prompts_request,
    warmup_images,
)
from service.runtime.settings import Settings

logger = logging.getLogger(__name__)

_SLOW_STEP_S: Final = 1.0
_NUM_TOKENS: Final = 8  # of each caption of the self-test


class SelfTestError(Exception):
    """The model gave no finite score, or none at all; the service must not become ready."""


async def warm_up(backend: Backend, queue: RequestQueue, engine: Engine, settings: Settings) -> None:
    """Start the engine, run every task of the model on one image, then the largest steps the scheduler makes.

    Where a step on one image takes a CPU more than a second, the latter are reduced, so that they take
    seconds. Raises SelfTestError where the model fails, or gives a score that is not finite.
    """
    requests = _self_test_requests(backend, 1)
    answers = [_submit(queue, request) for request in requests]
    engine.start()  # only now, so that they share their first step
    await _check(requests, answers)
    is_slow = backend.device == "cpu" and engine.longest_step_s > _SLOW_STEP_S
    sizes = REDUCED if is_slow else LARGEST
    if sizes.images_per_step > 1:
        requests = _self_test_requests(backend, sizes.images_per_step)
        await _check(requests, [_submit(queue, request) for request in requests])
    await _run_largest_steps(backend, queue, sizes, settings)


def _self_test_requests(backend: Backend, num_images: int) -> list[AnyRequest]:
    """Build requests for every task of the model on so many images."""
    captions = _caption_requests(backend, num_images) if backend.can_generate else []
    matches = [_match_request(backend, num_images)] if backend.can_match else []
    return [*captions, *matches]


async def _check(requests: Sequence[AnyRequest], answers: Sequence[asyncio.Future[Answer[Any]]]) -> None:
    """Await the answers; warn of an empty caption. Raises SelfTestError where one fails."""
    try:
        await asyncio.gather(*answers)
    except ServiceError as exc:
        raise SelfTestError(f"the self-test failed: {exc}; check the weights and BLIP2_DTYPE") from exc
    for request, answer in zip(requests, answers, strict=True):
        if isinstance(request.inputs, GenerateInput) and not answer.result().value[0][0].text:
            logger.warning("the self-test gave an empty caption")


async def _run_largest_steps(
    backend: Backend, queue: RequestQueue, sizes: StepSizes, settings: Settings
) -> None:
    """Run them one after the other; one that does not fit into the memory has taught its smaller size.

    Raises SelfTestError where the engine did not survive one.
    """
    requests: list[AnyRequest] = []
    if backend.can_match:
        requests.append(largest_pairs_request(backend, sizes))
    if backend.can_generate:
        max_kv_bytes = settings.kv_bytes_on(backend.device)
        requests.append(
            largest_prompts_request(backend, sizes, max_rows=settings.max_rows, max_kv_bytes=max_kv_bytes)
        )
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


def _caption_requests(backend: Backend, num_images: int) -> list[Request[Generations]]:
    params = GenerationParams(max_new_tokens=_NUM_TOKENS)
    prompt = backend.caption_prompt()
    prompts = (backend.tokenize_prompt(prompt, params),)
    questions = (prompt,) if backend.is_question_conditioned else ()
    images = warmup_images(backend, EncoderId.MAIN, num_images)
    return [Request(GenerateInput(image, prompts, params, questions)) for image in images]


def _match_request(backend: Backend, num_images: int) -> Request[Matches]:
    images = warmup_images(backend, backend.matching_encoder, num_images)
    return Request(MatchInput("a photo", images, Mode.RERANK, rerank_k=num_images, top_k=num_images))
