"""The inference routes: HTTP to parameters, and answers back to HTTP."""

from typing import TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from service.api.disconnect import deadline_of, while_waited_for
from service.api.middleware import context_of
from service.api.openapi import problem_responses, request_body
from service.api.request_body import read_body
from service.api.responses import CaptionResponse, CaptionsResponse, RetrieveResponse, VqaResponse
from service.api.schemas import Body, CaptionRequest, RetrieveRequest, VqaRequest
from service.inference import Upload
from service.runtime.lifecycle import Lifecycle
from service.runtime.settings import Settings

B = TypeVar("B", bound=Body)
_PROBLEMS = problem_responses(400, 404, 413, 415, 422, 429, 500, 503, 504)


class InferenceRoutes:
    """One method a route."""

    def __init__(self, settings: Settings, lifecycle: Lifecycle) -> None:
        self._settings = settings
        self._lifecycle = lifecycle

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
        return await self._lifecycle.unless_draining(
            read_body(request, schema, self._settings.max_body_bytes)
        )

    async def caption(self, request: Request) -> Response:
        """Describes an image; or several, each with a result of its own, so that a bad one fails alone."""
        parts = self._lifecycle.parts_for("caption")
        body = await self._read(request, CaptionRequest)
        body.check(self._settings)
        params = body.generation_params("num_captions")
        prompt = parts.backend.caption_prompt() if body.prompt is None else body.prompt
        deadline, context = deadline_of(request), context_of(request)
        if body.image is not None:
            work = parts.inference.generate(Upload("image", body.image), [prompt], params, deadline)
            served = await while_waited_for(request, deadline, work)
            return _json(parts.replies.caption(served, context, logprobs=body.logprobs))
        images = [Upload(f"images.{index}", image) for index, image in enumerate(body.images or [])]
        works = parts.inference.generate_each(images, prompt, params, deadline)
        outcomes = await while_waited_for(request, deadline, works)
        return _json(parts.replies.captions(outcomes, context, logprobs=body.logprobs))

    async def vqa(self, request: Request) -> Response:
        """Answers questions about an image, which is encoded once for all of them."""
        parts = self._lifecycle.parts_for("vqa")
        body = await self._read(request, VqaRequest)
        body.check(self._settings)
        params = body.generation_params("num_answers")
        history = [(turn.question, turn.answer) for turn in body.history]
        prompts = [
            parts.backend.question_prompt(question, history, body.prompt_template)
            for question in body.question
        ]
        deadline = deadline_of(request)
        work = parts.inference.generate(
            Upload("image", body.image), prompts, params, deadline, questions=body.question
        )
        served = await while_waited_for(request, deadline, work)
        answer = parts.replies.vqa(body.question, served, context_of(request), logprobs=body.logprobs)
        return _json(answer)

    async def retrieve(self, request: Request) -> Response:
        """Ranks images or texts by how well they fit a text or an image.

        Texts beyond the length the checkpoint was trained for lose their tail.
        """
        parts = self._lifecycle.parts_for("retrieve")
        body = await self._read(request, RetrieveRequest)
        body.check(self._settings)
        deadline = deadline_of(request)
        images = [Upload(f"candidates.images.{i}", image) for i, image in enumerate(body.candidate_images)]
        work = parts.inference.match(
            Upload("image", body.image) if body.image is not None else body.text or "",
            images or body.candidate_texts,
            body.chosen_mode,
            rerank_k=body.rerank_k,
            top_k=body.num_wanted,
            deadline=deadline,
        )
        served = await while_waited_for(request, deadline, work)
        return _json(parts.replies.retrieve(body.chosen_mode, served, context_of(request)))


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")
