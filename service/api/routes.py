"""The inference routes: HTTP to parameters, and answers back to HTTP.

Bytes, time and number of values of a body are bounded before they are spent.
"""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from service.api.body.form import parse_form
from service.api.body.json_text import TextLimits, parse_json
from service.api.cut_texts import warn_of_cut_questions, warn_of_cut_texts
from service.api.disconnect import (
    BodyReceiver,
    caller_of,
    cancel_on_disconnect_or_deadline,
    deadline_of,
)
from service.api.documented import EXAMPLE_IMAGE
from service.api.middleware import context_of
from service.api.openapi import PARAMETERS, problem_responses, request_body
from service.api.response_builder import ResponseBuilder
from service.api.responses import CaptionResponse, CaptionsResponse, RetrieveResponse, VqaResponse
from service.api.retrieve_schema import RetrieveRequest
from service.api.schemas import Body, CaptionRequest, VqaRequest
from service.errors import InvalidRequestError, UnsupportedContentTypeError, echo, echo_value
from service.runtime.assembly import Service
from service.runtime.metrics import Metrics
from service.runtime.readiness import Readiness, UploadLease, Uploads
from service.runtime.settings import Settings

B = TypeVar("B", bound=Body)
_PROBLEMS = problem_responses(400, 404, 408, 413, 415, 422, 429, 431, 500, 503, 504)


# A body within these limits is parsed within some 20 ms; others are by a thread.
_MAX_INLINE_BYTES, _MAX_INLINE_PARTS = 2**20, 256
# Generous, so that a count beyond a setting is explained by its name.
_VALUES_PER_ITEM: Final = 4
_OTHER_VALUES: Final = 256


class BodyReader:
    """Reads bodies. Large ones are parsed in a thread, one at a time: each may take its size again."""

    def __init__(self, settings: Settings) -> None:
        self._receiver = BodyReceiver(settings)
        most_items = max(settings.max_images, settings.max_questions, settings.max_candidates)
        self._limits = TextLimits(
            max_values=_VALUES_PER_ITEM * most_items + _OTHER_VALUES, max_chars=settings.max_text_chars
        )
        self._one_at_a_time = asyncio.Semaphore(1)

    async def read(self, request: Request, schema: type[B], lease: UploadLease, deadline: float | None) -> B:
        """Read the body and check its types.

        Raises UnreadableBodyError (400), RequestTimeoutError (408), BodyTooLargeError or TooManyItemsError
        (413), UnsupportedContentTypeError (415), InvalidRequestError (422), OverloadedError (429),
        ClientGoneError or DeadlineExceededError (504).
        """
        parse = _parser_for(request)
        body = bytearray()
        try:
            await self._receiver.receive(request, body, lease, deadline)
        except BaseException:
            body.clear()  # which the traceback would hold
            raise
        if len(body) <= _MAX_INLINE_BYTES and body.count(b"\r\n--") <= _MAX_INLINE_PARTS:
            return _parse_and_clear(parse, body, schema, self._limits)
        await cancel_on_disconnect_or_deadline(request, deadline, self._one_at_a_time.acquire())
        try:
            return await asyncio.to_thread(_parse_and_clear, parse, body, schema, self._limits)
        finally:
            self._one_at_a_time.release()


class InferenceRoutes:
    """One method for each route."""

    def __init__(self, settings: Settings, readiness: Readiness, uploads: Uploads, metrics: Metrics) -> None:
        self._settings = settings
        self._reader = BodyReader(settings)
        self._uploads = uploads
        self._readiness = readiness
        self._metrics = metrics

    def router(self) -> APIRouter:
        router = APIRouter(tags=["inference"])
        router.add_api_route(
            "/caption",
            self.caption,
            methods=["POST"],
            operation_id="caption",
            response_model=CaptionResponse | CaptionsResponse,
            responses=_PROBLEMS,
            openapi_extra={
                "parameters": PARAMETERS,
                "requestBody": request_body(
                    CaptionRequest, self._settings, {"image": EXAMPLE_IMAGE, "num_captions": 3}
                ),
            },
        )
        router.add_api_route(
            "/vqa",
            self.vqa,
            methods=["POST"],
            operation_id="vqa",
            response_model=VqaResponse,
            responses=_PROBLEMS,
            openapi_extra={
                "parameters": PARAMETERS,
                "requestBody": request_body(
                    VqaRequest,
                    self._settings,
                    {"image": EXAMPLE_IMAGE, "question": "what colour is the square?"},
                ),
            },
        )
        router.add_api_route(
            "/retrieve",
            self.retrieve,
            methods=["POST"],
            operation_id="retrieve",
            response_model=RetrieveResponse,
            responses=_PROBLEMS,
            openapi_extra={
                "parameters": PARAMETERS,
                "requestBody": request_body(
                    RetrieveRequest,
                    self._settings,
                    {"text": "a red square", "candidates": {"images": [EXAMPLE_IMAGE, EXAMPLE_IMAGE]}},
                ),
            },
        )
        return router

    async def _read(self, request: Request, schema: type[B], deadline: float | None) -> B:
        """Read and check the body. Its bytes are counted until its images are decoded."""
        _refuse_query(request)
        caller = caller_of(request)
        lease = context_of(request).lease = self._uploads.open(caller)
        body = await self._readiness.unless_draining(self._reader.read(request, schema, lease, deadline))
        body.check(self._settings)
        uploads = body.uploads()
        lease.keep(sum(upload.num_bytes for upload in uploads.values()))
        for field, upload in uploads.items():
            upload.field, upload.caller, upload.release = field, caller, lease.release
        return body

    async def _warn_of_cut(self, service: Service, questions: Mapping[str, str]) -> list[str]:
        if not service.backend.is_question_conditioned:
            return []
        return await warn_of_cut_questions(service.backend, questions)

    def _responses(self, service: Service) -> ResponseBuilder:
        return ResponseBuilder(service.backend, self._metrics)

    async def caption(self, request: Request) -> Response:
        """Caption an image; or several, each with a result of its own, so that a bad one fails alone."""
        service = self._readiness.service_for("caption")
        deadline, context = deadline_of(request), context_of(request)
        body = await self._read(request, CaptionRequest, deadline)
        params = body.generation_params("num_captions")
        prompt = service.backend.caption_prompt() if body.prompt is None else body.prompt
        warnings = await self._warn_of_cut(service, {"prompt": prompt})
        caller = caller_of(request)
        if body.image is not None:
            work = service.inference.generate(body.image, [prompt], params, deadline, caller=caller)
            served = await cancel_on_disconnect_or_deadline(request, deadline, work)
            responses = self._responses(service)
            return _json(responses.caption(served, context, logprobs=body.logprobs, warnings=warnings))
        all_work = service.inference.generate_each(body.images or [], prompt, params, deadline, caller=caller)
        outcomes = await cancel_on_disconnect_or_deadline(request, deadline, all_work)
        responses = self._responses(service)
        return _json(responses.captions(outcomes, context, logprobs=body.logprobs, warnings=warnings))

    async def vqa(self, request: Request) -> Response:
        """Answer questions about an image, which is encoded once for all of them."""
        service = self._readiness.service_for("vqa")
        deadline = deadline_of(request)
        body = await self._read(request, VqaRequest, deadline)
        params = body.generation_params("num_answers")
        history = [(turn.question, turn.answer) for turn in body.history]
        prompts = [
            service.backend.question_prompt(question, history, body.prompt_template)
            for question in body.question
        ]
        questions = {f"question.{index}": question for index, question in enumerate(body.question)}
        warnings = await self._warn_of_cut(service, questions)
        work = service.inference.generate(
            body.image, prompts, params, deadline, questions=body.question, caller=caller_of(request)
        )
        served = await cancel_on_disconnect_or_deadline(request, deadline, work)
        answer = self._responses(service).vqa(
            body.question, served, context_of(request), logprobs=body.logprobs, warnings=warnings
        )
        return _json(answer)

    async def retrieve(self, request: Request) -> Response:
        """Rank images or texts by how well they match a text or an image.

        A text beyond the length the checkpoint was trained for is cut at its end; `warnings` say so.
        """
        service = self._readiness.service_for("retrieve")
        deadline = deadline_of(request)
        body = await self._read(request, RetrieveRequest, deadline)
        work = service.inference.match(
            body.image if body.image is not None else body.text or "",
            body.candidate_images or body.candidate_texts,
            body.chosen_mode,
            rerank_k=body.rerank_k,
            top_k=body.num_results,
            deadline=deadline,
            caller=caller_of(request),
        )
        served = await cancel_on_disconnect_or_deadline(request, deadline, work)
        # Only now: a thousand long texts take up to a second, which no refused request should cost.
        warning = warn_of_cut_texts(service.backend, body.texts)
        warnings = await cancel_on_disconnect_or_deadline(request, deadline, warning)
        context = context_of(request)
        return _json(self._responses(service).retrieve(body.chosen_mode, served, context, warnings=warnings))


def _parser_for(request: Request) -> Callable[[bytearray, type[B], TextLimits], B]:
    """Return the parser of the body, which may run in a thread. Raises UnsupportedContentTypeError."""
    encoding = ", ".join(request.headers.getlist("content-encoding"))
    if encoding.strip().lower() not in ("", "identity"):
        raise UnsupportedContentTypeError(
            f"the Content-Encoding is {echo_value(encoding)}; send the body uncompressed"
        )
    content_types = request.headers.getlist("content-type")
    media_types = [each.partition(";")[0].strip().lower() for each in content_types]
    media_type = ", ".join(media_types) or "application/json"
    if media_type == "multipart/form-data":
        return partial(parse_form, content_types[0])
    if media_type == "application/json" or media_type.endswith("+json"):
        return parse_json
    raise UnsupportedContentTypeError(
        f"the body is {echo_value(media_type)}; send application/json or multipart/form-data"
    )


def _parse_and_clear(
    parse: Callable[[bytearray, type[B], TextLimits], B], body: bytearray, schema: type[B], limits: TextLimits
) -> B:
    try:
        return parse(body, schema, limits)
    finally:
        body.clear()  # which the traceback of an error would hold


def _refuse_query(request: Request) -> None:
    """Raise InvalidRequestError for query parameters, which would be ignored."""
    if request.query_params:
        name = echo(next(iter(request.query_params)))
        raise InvalidRequestError.of(name, "is a query parameter, which is not read; send it in the body")


def _json(response: BaseModel) -> Response:
    return Response(response.model_dump_json(exclude_none=True), media_type="application/json")
