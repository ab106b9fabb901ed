"""The inference routes: HTTP to parameters, and answers back to HTTP."""

from typing import TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from service.api.disconnect import caller_of, cancel_on_disconnect_or_deadline, deadline_of
from service.api.middleware import context_of
from service.api.openapi import problem_responses, request_body
from service.api.request_body import read_body
from service.api.response_builder import ResponseBuilder
from service.api.responses import CaptionResponse, CaptionsResponse, RetrieveResponse, VqaResponse
from service.api.schemas import Body, CaptionRequest, RetrieveRequest, VqaRequest
from service.inference import Upload
from service.runtime.assembly import Service
from service.runtime.metrics import Metrics
from service.runtime.readiness import Readiness
from service.runtime.settings import Settings

B = TypeVar("B", bound=Body)
_PROBLEMS = problem_responses(400, 404, 413, 415, 422, 429, 500, 503, 504)


class InferenceRoutes:
    """One method for each route."""

    def __init__(self, settings: Settings, readiness: Readiness, metrics: Metrics) -> None:
        self._settings = settings
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
                "requestBody": request_body(CaptionRequest, {"image": "iVBORw0KGgo…", "num_captions": 3})
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
                "requestBody": request_body(
                    VqaRequest, {"image": "iVBORw0KGgo…", "question": "what colour is the circle?"}
                )
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
                "requestBody": request_body(
                    RetrieveRequest,
                    {"text": "a red circle", "candidates": {"images": ["iVBORw0KGgo…", "iVBORw0KGgo…"]}},
                )
            },
        )
        return router

    async def _read(self, request: Request, schema: type[B]) -> B:
        return await self._readiness.unless_draining(
            read_body(request, schema, self._settings.max_body_bytes)
        )

    def _responses(self, service: Service) -> ResponseBuilder:
        return ResponseBuilder(service.backend, self._metrics)

    async def caption(self, request: Request) -> Response:
        """Caption an image; or several, each with a result of its own, so that a bad one fails alone."""
        service = self._readiness.service_for("caption")
        body = await self._read(request, CaptionRequest)
        body.check(self._settings)
        params = body.generation_params("num_captions")
        prompt = service.backend.caption_prompt() if body.prompt is None else body.prompt
        deadline, context, caller = deadline_of(request), context_of(request), caller_of(request)
        if body.image is not None:
            work = service.inference.generate(
                Upload("image", body.image), [prompt], params, deadline, caller=caller
            )
            served = await cancel_on_disconnect_or_deadline(request, deadline, work)
            return _json(self._responses(service).caption(served, context, logprobs=body.logprobs))
        images = [Upload(f"images.{index}", image) for index, image in enumerate(body.images or [])]
        all_work = service.inference.generate_each(images, prompt, params, deadline, caller=caller)
        outcomes = await cancel_on_disconnect_or_deadline(request, deadline, all_work)
        return _json(self._responses(service).captions(outcomes, context, logprobs=body.logprobs))

    async def vqa(self, request: Request) -> Response:
        """Answer questions about an image, which is encoded once for all of them."""
        service = self._readiness.service_for("vqa")
        body = await self._read(request, VqaRequest)
        body.check(self._settings)
        params = body.generation_params("num_answers")
        history = [(turn.question, turn.answer) for turn in body.history]
        prompts = [
            service.backend.question_prompt(question, history, body.prompt_template)
            for question in body.question
        ]
        deadline = deadline_of(request)
        work = service.inference.generate(
            Upload("image", body.image),
            prompts,
            params,
            deadline,
            questions=body.question,
            caller=caller_of(request),
        )
        served = await cancel_on_disconnect_or_deadline(request, deadline, work)
        answer = self._responses(service).vqa(
            body.question, served, context_of(request), logprobs=body.logprobs
        )
        return _json(answer)

    async def retrieve(self, request: Request) -> Response:
        """Rank images or texts by how well they match a text or an image.

        Texts beyond the length the checkpoint was trained for are truncated.
        """
        service = self._readiness.service_for("retrieve")
        body = await self._read(request, RetrieveRequest)
        body.check(self._settings)
        deadline = deadline_of(request)
        images = [Upload(f"candidates.images.{i}", image) for i, image in enumerate(body.candidate_images)]
        work = service.inference.match(
            Upload("image", body.image) if body.image is not None else body.text or "",
            images or body.candidate_texts,
            body.chosen_mode,
            rerank_k=body.rerank_k,
            top_k=body.num_results,
            deadline=deadline,
            caller=caller_of(request),
        )
        served = await cancel_on_disconnect_or_deadline(request, deadline, work)
        return _json(self._responses(service).retrieve(body.chosen_mode, served, context_of(request)))


def _json(response: BaseModel) -> Response:
    return Response(response.model_dump_json(exclude_none=True), media_type="application/json")
