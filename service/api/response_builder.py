"""Builds responses from the engine's answers, and records their durations in context and metrics."""

from collections.abc import Sequence
from typing import Any

from model import Generation
from service.api.middleware import RequestContext
from service.api.responses import (
    Alternative,
    Caption,
    CaptionResponse,
    CaptionsResponse,
    FailedImage,
    GenerateTimings,
    MatchTimings,
    Problem,
    RetrieveResponse,
    RetrieveResult,
    TokenLogprob,
    VqaAnswer,
    VqaResponse,
)
from service.engine.request import Generations, Matches, Mode
from service.errors import ServiceError
from service.inference import ServedAnswer
from service.model_backend import Backend
from service.runtime.metrics import Metrics


class ResponseBuilder:
    """Builds the responses of one model.

    logprobs, below: whether they list each token. warnings: see `Warnings`.
    """

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend = backend
        self._metrics = metrics

    def caption(
        self,
        served: ServedAnswer[Generations],
        context: RequestContext,
        *,
        logprobs: bool,
        warnings: Sequence[str] = (),
    ) -> CaptionResponse:
        self._count_tokens(served)
        return CaptionResponse(
            model=self._backend.name,
            captions=[
                Caption(
                    text=generation.text,
                    score=generation.score,
                    num_tokens=generation.num_tokens,
                    finish_reason=generation.finish_reason,
                    logprobs=self._tokens(generation) if logprobs else None,
                )
                for generation in served.answer.value[0]
            ],
            image_cached=served.answer.image_cached,
            timings_ms=GenerateTimings(**self._timings(served, "decode", context)),
            warnings=[*served.warnings, *warnings] or None,
        )

    def captions(
        self,
        outcomes: Sequence[ServedAnswer[Generations] | ServiceError],
        context: RequestContext,
        *,
        logprobs: bool,
        warnings: Sequence[str] = (),
    ) -> CaptionsResponse:
        return CaptionsResponse(
            model=self._backend.name,
            results=[
                self.caption(outcome, context, logprobs=logprobs, warnings=warnings)
                if isinstance(outcome, ServedAnswer)
                else FailedImage(error=Problem.of(outcome, context.request_id))
                for outcome in outcomes
            ],
        )

    def vqa(
        self,
        questions: Sequence[str],
        served: ServedAnswer[Generations],
        context: RequestContext,
        *,
        logprobs: bool,
        warnings: Sequence[str] = (),
    ) -> VqaResponse:
        self._count_tokens(served)
        return VqaResponse(
            model=self._backend.name,
            answers=[
                self._vqa_answer(question, generations, logprobs=logprobs)
                for question, generations in zip(questions, served.answer.value, strict=True)
            ],
            image_cached=served.answer.image_cached,
            timings_ms=GenerateTimings(**self._timings(served, "decode", context)),
            warnings=[*served.warnings, *warnings] or None,
        )

    def retrieve(
        self,
        mode: Mode,
        served: ServedAnswer[Matches],
        context: RequestContext,
        *,
        warnings: Sequence[str] = (),
    ) -> RetrieveResponse:
        return RetrieveResponse(
            model=self._backend.matching_name,
            mode=mode,
            results=[
                RetrieveResult(
                    rank=rank,
                    index=match.index,
                    score=match.score,
                    itc=match.itc,
                    itm_probability=match.itm_probability,
                )
                for rank, match in enumerate(served.answer.value, start=1)
            ],
            timings_ms=MatchTimings(**self._timings(served, "match", context)),
            warnings=[*served.warnings, *warnings] or None,
        )

    def _timings(self, served: ServedAnswer[Any], work: str, context: RequestContext) -> dict[str, float]:
        answer = served.answer
        seconds = {
            "queue": answer.times.queue_s,
            "preprocess": served.preprocess_s,
            "vision": answer.times.vision_s,
            "qformer": answer.times.qformer_s,
            work: answer.times.work_s,
        }
        for stage in ("preprocess", "vision", "qformer", work):
            self._metrics.stage_seconds.labels(stage).observe(seconds[stage])
        # Of several images in one request, the header and the log tell of the slowest of each stage.
        timings_ms = {stage: round(value * 1000, 3) for stage, value in seconds.items()}
        context.timings_ms = {
            stage: max(value, context.timings_ms.get(stage, 0.0)) for stage, value in timings_ms.items()
        }
        context.rows = max(context.rows, answer.max_rows)
        context.image_cached = answer.image_cached and context.image_cached is not False
        return {**timings_ms, "total": context.total_ms()}

    def _vqa_answer(self, question: str, generations: tuple[Generation, ...], *, logprobs: bool) -> VqaAnswer:
        best, *others = (
            Alternative(
                answer=generation.text,
                score=generation.score,
                num_tokens=generation.num_tokens,
                logprobs=self._tokens(generation) if logprobs else None,
            )
            for generation in generations
        )
        return VqaAnswer(question=question, alternatives=others, **dict(best))

    def _tokens(self, generation: Generation) -> list[TokenLogprob]:
        texts = self._backend.token_texts(generation.token_ids)
        return [
            TokenLogprob(token_id=token_id, token=text, logprob=log_prob)
            for token_id, text, log_prob in zip(
                generation.token_ids, texts, generation.log_probs, strict=True
            )
        ]

    def _count_tokens(self, served: ServedAnswer[Generations]) -> None:
        self._metrics.generated_tokens.inc(
            sum(generation.num_tokens for group in served.answer.value for generation in group)
        )
