"""From parsed requests to answers: desk, cache, line and engine in a row. Runs on the event loop.

An image is read and hashed, its encodings are looked up, and only what is not known goes on to be decoded and
encoded. Cancelling one of these coroutines withdraws its work, wherever it is.
"""

import asyncio
import time
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from model import GenerationParams
from service.cache import EmbeddingCache
from service.engine.request import (
    Answer,
    Encodings,
    GenerateJob,
    Generations,
    ImageInput,
    Kind,
    Matches,
    MatchJob,
    Mode,
    Ticket,
    Tower,
    generate_needs,
    match_needs,
)
from service.engine.request_queue import Line, Place
from service.errors import FieldError, InferenceFailedError, RequestError, ServiceError
from service.image_decoding import ImageDesk, ImageFile
from service.model_backend import Backend

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Upload:
    """An image as it came. source: base64 or a data: URI, or the file itself. field: names it in errors."""

    field: str
    source: str | bytes


@dataclass(frozen=True, slots=True, eq=False)
class Served(Generic[T]):
    """An answer, and the seconds its images took before they stood in line."""

    answer: Answer[T]
    preprocess_s: float


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked about an image; see `GenerateJob`."""

    prompts: tuple[tuple[int, ...], ...]
    params: GenerationParams
    questions: tuple[str, ...]


class Inference:
    """deadline: on the monotonic clock, None for none; past it a job never reaches the device.

    All verbs raise OverloadedError or NotReadyError where the line does not take the work, a RequestError
    where an image cannot be used, and InferenceFailedError where the model fails on it.
    """

    def __init__(self, backend: Backend, desk: ImageDesk, cache: EmbeddingCache, line: Line) -> None:
        self._backend = backend
        self._desk = desk
        self._cache = cache
        self._line = line

    async def generate(
        self,
        image: Upload,
        prompts: Sequence[str],
        params: GenerationParams,
        deadline: float | None,
        *,
        questions: Sequence[str] | None = None,
    ) -> Served[Generations]:
        """Answers several prompts about one image, which is encoded once.

        questions: what a question-conditioned Q-Former is shown; None: the prompts. Raises
        InvalidPromptError where a prompt is too long.
        """
        asked = self._ask(prompts, prompts if questions is None else questions, params)
        (place,) = self._line.reserve(len(prompts))
        with place:
            return await self._generate(place, image, asked, deadline)

    async def generate_each(
        self, images: Sequence[Upload], prompt: str, params: GenerationParams, deadline: float | None
    ) -> list[Served[Generations] | ServiceError]:
        """Answers one prompt about each image; all are let in, or none. An image that fails, fails alone."""
        asked = self._ask([prompt], [prompt], params)
        places = self._line.reserve(*[1] * len(images))
        with ExitStack() as stack:
            for place in places:
                stack.enter_context(place)
            outcomes = await asyncio.gather(
                *(
                    self._generate(place, image, asked, deadline)
                    for place, image in zip(places, images, strict=True)
                ),
                return_exceptions=True,
            )
        return [_outcome_of_one(outcome) for outcome in outcomes]

    async def match(
        self,
        query: str | Upload,
        candidates: Sequence[str | Upload],
        mode: Mode,
        *,
        rerank_k: int,
        top_k: int,
        deadline: float | None,
    ) -> Served[Matches]:
        """Scores candidates, texts or images, against a query."""
        (place,) = self._line.reserve(len(candidates))
        with place:
            started = time.monotonic()
            sides = [query, *candidates]
            uploads = [side for side in sides if isinstance(side, Upload)]
            images = iter(await self._take_in(uploads, match_needs(mode), self._backend.matching_tower))
            inputs = [side if isinstance(side, str) else next(images) for side in sides]
            ticket: Ticket[Matches] = Ticket(deadline)
            job = MatchJob(inputs[0], tuple(inputs[1:]), mode, rerank_k, top_k, ticket)
            place.put(job)
            return await self._served(ticket, time.monotonic() - started)

    def _ask(self, prompts: Sequence[str], questions: Sequence[str], params: GenerationParams) -> Asked:
        prompt_ids = (self._backend.tokenize_prompt(prompt, params) for prompt in prompts)
        return Asked(tuple(prompt_ids), params, tuple(questions) if self._backend.shows_questions else ())

    async def _generate(
        self,
        place: Place,
        image: Upload,
        asked: Asked,
        deadline: float | None,
    ) -> Served[Generations]:
        started = time.monotonic()
        needs = generate_needs(shows_questions=bool(asked.questions))
        (taken,) = await self._take_in([image], needs, Tower.MAIN)
        ticket: Ticket[Generations] = Ticket(deadline)
        place.put(GenerateJob(taken, asked.prompts, asked.params, ticket, asked.questions))
        return await self._served(ticket, time.monotonic() - started)

    async def _served(self, ticket: Ticket[T], preprocess_s: float) -> Served[T]:
        answer = await asyncio.wrap_future(ticket.future)
        self._cache.store(answer.fresh)
        return Served(answer, preprocess_s)

    async def _take_in(
        self, images: Sequence[Upload], needs: frozenset[Kind], tower: Tower
    ) -> list[ImageInput]:
        files = await _all(_blamed(image.field, self._desk.read(image.source)) for image in images)
        known = await self._cache.lookup([_digest_for(file, tower) for file in files], needs)
        return await _all(
            _blamed(image.field, self._to_input(file, known[_digest_for(file, tower)], needs, tower))
            for image, file in zip(images, files, strict=True)
        )

    async def _to_input(
        self, file: ImageFile, known: Encodings, needs: frozenset[Kind], tower: Tower
    ) -> ImageInput:
        suffices = needs <= known.keys() or Kind.IMAGE_FEATURES in known
        pixel_values = None if suffices else await self._desk.prepare(file, tower)
        return ImageInput(_digest_for(file, tower), pixel_values, known, tower)


def _digest_for(file: ImageFile, tower: Tower) -> str:
    return file.digest if tower is Tower.MAIN else f"{file.digest}:{tower}"


def _outcome_of_one(outcome: Served[Generations] | BaseException) -> Served[Generations] | ServiceError:
    """Keeps what concerns one image alone, and raises what concerns them all."""
    if isinstance(outcome, Served | RequestError | InferenceFailedError):
        return outcome
    raise outcome


async def _blamed(field: str, work: Coroutine[Any, Any, T]) -> T:
    """Has an error say which field it is about."""
    try:
        return await work
    except RequestError as exc:
        raise type(exc)(f"{field}: {exc.detail}", fields=(FieldError(field, exc.detail),)) from exc


async def _all(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Gives what all of them give, in order; the first failure ends the others."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
