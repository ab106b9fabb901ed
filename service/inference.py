"""The path of a request: read and hash its images, look up the cache, decode, queue, await the answer.

An image is decoded and encoded only where its embeddings are not cached. All of it runs on the event loop;
cancelling one of these coroutines withdraws its work, wherever it is.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from model import EmbeddingKind, GenerationParams
from service.cache.embedding_cache import EmbeddingCache, Lookup
from service.engine.image_pool import ImageInput
from service.engine.request import (
    MIN_BULK_CANDIDATES,
    Answer,
    GenerateInput,
    Generations,
    Matches,
    MatchInput,
    Mode,
    Request,
    required_to_generate,
    required_to_match,
)
from service.engine.request_queue import RequestQueue, Reservation
from service.errors import FieldError, InferenceFailedError, RequestError, ServiceError
from service.image_decoding import ImageDecoder, ImageFile, Upload
from service.model_backend import Backend, EncoderId

_MAX_INLINE_CHARS: Final = 2**13  # of all prompts, which take a millisecond; more are tokenized in a thread
_MAX_DECODED_AT_ONCE: Final = 4  # images of one request, so that those of others come between them

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class ServedAnswer(Generic[T]):
    """An answer, and the seconds its images took before they were queued.

    warnings: what the caller should know of input that was used all the same.
    """

    answer: Answer[T]
    preprocess_s: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenizedPrompts:
    """Prompts to generate from about an image; see `GenerateInput`."""

    prompt_ids: tuple[tuple[int, ...], ...]
    params: GenerationParams
    questions: tuple[str, ...]


class Inference:
    """Runs requests: decodes images, looks up embeddings, queues, awaits the answer.

    deadline: on the monotonic clock, or None; past it a request never reaches the device. caller: see
    `Request`.

    All methods raise OverloadedError or NotReadyError where the queue refuses the work, a RequestError where
    an image cannot be used, and InferenceFailedError where the model fails on it.
    """

    def __init__(
        self,
        backend: Backend,
        image_decoder: ImageDecoder,
        cache: EmbeddingCache,
        queue: RequestQueue,
        *,
        observe_queue_s: Callable[[float], None],
    ) -> None:
        self._backend = backend
        self._image_decoder = image_decoder
        self._cache = cache
        self._queue = queue
        self._observe_queue_s = observe_queue_s

    async def generate(
        self,
        image: Upload,
        prompts: Sequence[str],
        params: GenerationParams,
        deadline: float | None,
        *,
        questions: Sequence[str] | None = None,
        caller: str = "",
    ) -> ServedAnswer[Generations]:
        """Generate texts for several prompts about one image, which is encoded once.

        questions: what a question-conditioned Q-Former reads; None: the prompts. Raises InvalidPromptError
        where a prompt is too long.
        """
        tokenized = await self._tokenize(prompts, prompts if questions is None else questions, params)
        (reservation,) = self._queue.make_reservations(
            len(prompts), num_bytes=self._image_bytes(EncoderId.MAIN)
        )
        return await self._generate(reservation, image, tokenized, deadline, caller)

    async def generate_each(
        self,
        images: Sequence[Upload],
        prompt: str,
        params: GenerationParams,
        deadline: float | None,
        *,
        caller: str = "",
    ) -> list[ServedAnswer[Generations] | ServiceError]:
        """Generate texts for one prompt about each image, all queued or none. A bad image fails alone."""
        tokenized = await self._tokenize([prompt], [prompt], params)
        reservations = self._queue.make_reservations(
            *[1] * len(images), num_bytes=self._image_bytes(EncoderId.MAIN)
        )
        with ExitStack() as stack:
            for reservation in reservations:
                stack.enter_context(reservation)
            outcomes = await asyncio.gather(
                *(
                    self._generate(reservation, image, tokenized, deadline, caller)
                    for reservation, image in zip(reservations, images, strict=True)
                ),
                return_exceptions=True,
            )
        return [_outcome_or_raise(outcome) for outcome in outcomes]

    async def match(
        self,
        query: str | Upload,
        candidates: Sequence[str | Upload],
        mode: Mode,
        *,
        rerank_k: int,
        top_k: int,
        deadline: float | None,
        caller: str = "",
    ) -> ServedAnswer[Matches]:
        """Score candidates, texts or images, against a query."""
        sides = [query, *candidates]
        uploads = [side for side in sides if isinstance(side, Upload)]
        encoder = self._backend.matching_encoder
        is_bulk, num_bytes = len(candidates) >= MIN_BULK_CANDIDATES, self._image_bytes(encoder) * len(uploads)
        (reservation,) = self._queue.make_reservations(len(candidates), num_bytes=num_bytes, is_bulk=is_bulk)
        with reservation:
            started = time.monotonic()
            images = iter(await self._load_images(uploads, required_to_match(mode), encoder, is_bulk=is_bulk))
            resolved = [side if isinstance(side, str) else next(images) for side in sides]
            inputs = MatchInput(resolved[0], tuple(resolved[1:]), mode, rerank_k, top_k)
            request: Request[Matches] = Request(inputs, deadline, caller=caller)
            return await self._submit(reservation, request, started, uploads)

    def _image_bytes(self, encoder: EncoderId) -> int:
        """Return the number of bytes of one decoded image: 8 bits for each of three channels."""
        return 3 * self._backend.image_size(encoder) ** 2

    async def _tokenize(
        self, prompts: Sequence[str], questions: Sequence[str], params: GenerationParams
    ) -> TokenizedPrompts:
        def tokenize() -> tuple[tuple[int, ...], ...]:
            return tuple(self._backend.tokenize_prompt(prompt, params) for prompt in prompts)

        is_long = sum(map(len, prompts)) > _MAX_INLINE_CHARS
        prompt_ids = await asyncio.to_thread(tokenize) if is_long else tokenize()
        is_conditioned = self._backend.is_question_conditioned
        return TokenizedPrompts(prompt_ids, params, tuple(questions) if is_conditioned else ())

    async def _generate(
        self,
        reservation: Reservation,
        image: Upload,
        tokenized: TokenizedPrompts,
        deadline: float | None,
        caller: str,
    ) -> ServedAnswer[Generations]:
        with reservation:
            started = time.monotonic()
            required = required_to_generate(is_question_conditioned=bool(tokenized.questions))
            (image_input,) = await self._load_images([image], required, EncoderId.MAIN)
            inputs = GenerateInput(image_input, tokenized.prompt_ids, tokenized.params, tokenized.questions)
            request: Request[Generations] = Request(inputs, deadline, caller=caller)
            return await self._submit(reservation, request, started, [image])

    async def _submit(
        self, reservation: Reservation, request: Request[T], started: float, images: Sequence[Upload]
    ) -> ServedAnswer[T]:
        reservation.submit(request)
        preprocess_s = time.monotonic() - started
        try:
            answer = await asyncio.wrap_future(request.future)
        except BaseException:
            self._observe_queue_s(request.times.queue_s)  # it has expired, was cancelled, or failed
            raise
        self._observe_queue_s(answer.times.queue_s)
        self._cache.store(answer.computed)
        warnings = tuple(f"{image.field}: {warning}" for image in images for warning in image.warnings)
        return ServedAnswer(answer, preprocess_s, warnings)

    async def _load_images(
        self,
        images: Sequence[Upload],
        required: frozenset[EmbeddingKind],
        encoder: EncoderId,
        *,
        is_bulk: bool = False,
    ) -> list[ImageInput]:
        files = await _gather_or_cancel(
            _with_field_name(image.field, self._image_decoder.read(image.take())) for image in images
        )
        for image, file in zip(images, files, strict=True):
            image.warnings = file.warnings
        digests = [_digest_for(file, encoder) for file in files]
        known = await self._cache.lookup(digests, required, encoder, is_bulk=is_bulk)
        turns = asyncio.Semaphore(_MAX_DECODED_AT_ONCE)
        works = [
            _with_field_name(image.field, self._build_input(turns, image, file, known, required, encoder))
            for image, file in zip(images, files, strict=True)
        ]
        files.clear()  # each file is held by its decoding alone
        return await _gather_or_cancel(works)

    async def _build_input(
        self,
        turns: asyncio.Semaphore,
        image: Upload,
        file: ImageFile,
        cached: Lookup,
        required: frozenset[EmbeddingKind],
        encoder: EncoderId,
    ) -> ImageInput:
        digest = _digest_for(file, encoder)
        known = cached[digest]
        is_known = required <= known.keys() or EmbeddingKind.IMAGE_FEATURES in known
        pixels = None
        try:
            if not is_known:
                async with turns:
                    size = self._backend.image_size(encoder)
                    pixels = await self._image_decoder.decode_pixels(file, size, caller=image.caller)
        finally:
            image.drop()
        return ImageInput(digest, pixels, known, encoder)


def _digest_for(file: ImageFile, encoder: EncoderId) -> str:
    return file.digest if encoder is EncoderId.MAIN else f"{file.digest}:{encoder}"


def _outcome_or_raise(
    outcome: ServedAnswer[Generations] | BaseException,
) -> ServedAnswer[Generations] | ServiceError:
    """Return what concerns one image alone, and raise what concerns them all."""
    if isinstance(outcome, ServedAnswer | RequestError | InferenceFailedError):
        return outcome
    raise outcome


async def _with_field_name(field: str, work: Coroutine[Any, Any, T]) -> T:
    """Await work, and add the name of its field to an error."""
    try:
        return await work
    except RequestError as exc:
        raise type(exc)(f"{field}: {exc.detail}", fields=(FieldError(field, exc.detail),)) from exc


async def _gather_or_cancel(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Await all, and return their results in order; the first failure cancels the others."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        while tasks:  # none is left here: its error refers to this frame
            tasks.pop().cancel()
