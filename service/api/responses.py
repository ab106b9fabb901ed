"""The schemas of responses. Times are milliseconds; scores are natural logarithms unless said."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field

from service.engine.request import Mode
from service.errors import ServiceError


class ResponseModel(BaseModel):
    """Base of all schemas here."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class FieldProblem(ResponseModel):
    """The fault of one field."""

    field: str
    message: str


class Problem(ResponseModel):
    """An error in the form of RFC 9457; the media type is application/problem+json."""

    type: str = Field(examples=["urn:blip2:problem:invalid_image"])
    title: str = Field(examples=["The image cannot be used"])
    status: int = Field(examples=[422])
    detail: str = Field(
        examples=["the image is 10000 x 10000 = 100 Mpx, the limit is 40 Mpx; downscale it first"]
    )
    code: str = Field(examples=["invalid_image"])
    request_id: str
    errors: list[FieldProblem] | None = None

    @classmethod
    def of(cls, error: ServiceError, request_id: str) -> Self:
        fields = [FieldProblem(field=field.field, message=field.message) for field in error.fields]
        return cls(
            type=f"urn:blip2:problem:{error.code}",
            title=error.title,
            status=error.status,
            detail=error.detail,
            code=error.code,
            request_id=request_id,
            errors=fields or None,
        )


def problem_response(
    error: ServiceError, request_id: str, headers: Mapping[str, str] | None = None
) -> Response:
    """Return the answer to a request that failed."""
    retry = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    # A body that is not awaited any more would be read as the next request.
    close = {"Connection": "close"} if error.closes_connection else {}
    return Response(
        Problem.of(error, request_id).model_dump_json(exclude_none=True),
        status_code=error.status,
        headers={**(headers or {}), **retry, **close},
        media_type="application/problem+json",
    )


# Of any answer, the last field. Left out where there is nothing to say.
Warnings = Annotated[
    list[str] | None,
    Field(
        description="what the answer left out of the request, or assumed, for people; absent where nothing",
        examples=[["image: the JPEG has no end marker and may be cut off; no pixels are missing"]],
    ),
]


class GenerateTimings(ResponseModel):
    """Milliseconds in each stage. Work that was shared with other requests counts in full."""

    queue: float
    preprocess: float
    vision: float
    qformer: float
    decode: float
    total: float


class MatchTimings(ResponseModel):
    """Milliseconds in each stage. Work that was shared with other requests counts in full."""

    queue: float
    preprocess: float
    vision: float
    qformer: float
    match: float
    total: float


class TokenLogprob(ResponseModel):
    """One token of an answer. The sum of their log-probabilities is what the score is computed from."""

    token_id: int
    token: str
    logprob: float


class Caption(ResponseModel):
    """score: log-probability / num_tokens ** length_penalty. num_tokens: the end token counts."""

    text: str
    score: float
    num_tokens: int
    finish_reason: Literal["stop", "length"]
    logprobs: list[TokenLogprob] | None = None


class CaptionResponse(ResponseModel):
    """Captions of one image, the best first. image_cached: its embeddings were cached."""

    model: str
    captions: list[Caption]
    image_cached: bool
    timings_ms: GenerateTimings
    warnings: Warnings = None


class FailedImage(ResponseModel):
    """The result of an image that could not be used."""

    error: Problem


class CaptionsResponse(ResponseModel):
    """One result for each of the images, in their order."""

    model: str
    results: list[CaptionResponse | FailedImage]


class Alternative(ResponseModel):
    """An answer with a lower score."""

    answer: str
    score: float
    num_tokens: int
    logprobs: list[TokenLogprob] | None = None


class VqaAnswer(ResponseModel):
    """The best answer to one question. score: log-probability / num_tokens ** length_penalty."""

    question: str
    answer: str
    score: float
    num_tokens: int
    logprobs: list[TokenLogprob] | None = None
    alternatives: list[Alternative]


class VqaResponse(ResponseModel):
    """One answer for each question, in their order. image_cached: its embeddings were cached."""

    model: str
    answers: list[VqaAnswer]
    image_cached: bool
    timings_ms: GenerateTimings
    warnings: Warnings = None


class RetrieveResult(ResponseModel):
    """One candidate.

    rank: from 1. index: among the candidates. itc: the cosine, from -1 to 1. itm_probability: that image and
    text belong together, by the matching head. score: in mode itc the cosine, in mode itm the natural log of
    itm_probability, in mode rerank the match logit plus the cosine.
    """

    rank: int
    index: int
    score: float
    itc: float
    itm_probability: float | None = None


class RetrieveResponse(ResponseModel):
    """The best candidates, the best first. mode: the one that was used."""

    model: str
    mode: Mode
    results: list[RetrieveResult]
    timings_ms: MatchTimings
    warnings: Warnings = None


class ProbeResponse(ResponseModel):
    """A probe that succeeds; one that fails answers 503 with a problem."""

    status: Literal["ok"] = "ok"


class VersionResponse(ResponseModel):
    """Versions of service and model. All but `version` is null until the weights are loaded."""

    version: str
    model: str | None = None
    retrieval_model: str | None = None
    fingerprint: str | None = None
    device: str | None = None
    dtype: str | None = None
    tasks: list[Literal["caption", "vqa", "retrieve"]] | None = None
