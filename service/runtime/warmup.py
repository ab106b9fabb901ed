"""Warm-up: a self-test, then the largest steps; the longest one sets the default stall time-out."""

import asyncio
import logging
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any, Final

import torch
from torch import Tensor

from model import GenerationParams
from model.generation import MAX_BEAMS
from service.engine.image_pool import ImageInput
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
from service.engine.scheduler import MAX_IMAGES_PER_STEP, MAX_PROMPT_TOKENS_PER_STEP, MAX_TEXTS_PER_STEP
from service.errors import LostRequestError, NotReadyError, ServiceError
from service.model_backend import Backend, EncoderId

logger = logging.getLogger(__name__)

_NUM_TOKENS: Final = 3  # of each answer: a prefill, and two decode steps over all rows
_LONG_TEXT: Final = "photo " * 600  # more tokens than a Q-Former reads


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
        requests.append(_largest_pairs_request(backend))
    if backend.can_generate:
        requests.append(_largest_prompts_request(backend, max_rows))
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


def _largest_prompts_request(backend: Backend, max_rows: int) -> Request[Generations]:
    """Build as many of the longest prompts as one prefill takes, and short ones until all rows are taken."""
    params = GenerationParams(num_beams=MAX_BEAMS, max_new_tokens=_NUM_TOKENS, min_new_tokens=_NUM_TOKENS)
    short = backend.tokenize_prompt(backend.question_prompt("what is this?", (), None), params)
    num_prefix_tokens = backend.max_prefix_tokens - _NUM_TOKENS
    length = num_prefix_tokens - backend.num_query_tokens
    longest = tuple(islice(cycle(short), max(length, len(short))))
    num_prompts = max(1, max_rows // MAX_BEAMS)
    num_longest = min(num_prompts, max(1, MAX_PROMPT_TOKENS_PER_STEP // num_prefix_tokens))
    prompts = (longest,) * num_longest + (short,) * (num_prompts - num_longest)
    questions = (_LONG_TEXT,) * num_prompts if backend.is_question_conditioned else ()
    image = _warmup_images(backend, EncoderId.MAIN)[0]
    return Request(GenerateInput(image, prompts, params, questions))


def _largest_pairs_request(backend: Backend) -> Request[Matches]:
    """Build a full batch of the longest texts, which are then scored in full batches of pairs."""
    image = _warmup_images(backend, backend.matching_encoder)[0]
    texts = tuple(f"{number} {_LONG_TEXT}" for number in range(MAX_TEXTS_PER_STEP))
    return Request(MatchInput(image, texts, Mode.ITM, rerank_k=1, top_k=1))


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
