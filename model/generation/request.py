"""What the decoder is asked and answers: a job, the same job at work, and how much work there may be."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.errors import InvalidParamsError
from model.generation.params import GenerationParams
from model.language import DecodingState, Extent, LanguageModel


@dataclass(frozen=True, slots=True, eq=False)
class DecodeJob:
    """One image and one prompt to be continued.

    language_model_inputs: [Q, L] soft tokens. prompt_ids: the prompt with its special token, as
    `LanguageModel.tokenize` gives it. Two jobs are never equal, so a job can be a key.
    """

    language_model_inputs: Tensor
    prompt_ids: tuple[int, ...]
    params: GenerationParams


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer.

    token_ids: the new tokens, the end token included where there is one; num_tokens: how many.
    score: log-probability / num_tokens ** length_penalty. For beams it is transformers' `sequences_scores`,
    whose log-probabilities are those the rules left; for one-beam jobs those of the bare model.
    log_probs: of each token; their sum is the log-probability. finish_reason: "stop" where the model ended
    the answer, "length" where max_new_tokens did.
    """

    text: str
    token_ids: tuple[int, ...]
    score: float
    num_tokens: int
    finish_reason: Literal["stop", "length"]
    log_probs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class DecoderLimits:
    """What may run at once. max_rows: beams and samples. max_kv_bytes: of their keys and values."""

    max_rows: int = 2**31
    max_kv_bytes: int = 2**63

    def are_exceeded(self, extents: Sequence[Extent], state: DecodingState) -> bool:
        if not extents:
            return False
        num_rows = sum(extent.num_rows for extent in extents)
        return num_rows > self.max_rows or state.num_bytes(extents) > self.max_kv_bytes

    def check(self, extent: Extent, state: DecodingState) -> None:
        """Raises InvalidParamsError for what exceeds them alone."""
        if extent.num_rows > self.max_rows:
            raise InvalidParamsError(
                f"the job works on {extent.num_rows} beams or samples at once, the limit is "
                f"{self.max_rows}; lower num_beams or the number of answers"
            )
        num_bytes = state.num_bytes([extent])
        if num_bytes > self.max_kv_bytes:
            raise InvalidParamsError(
                f"{extent.num_rows} beams of up to {extent.max_new_tokens} new tokens behind "
                f"{extent.num_prefix_tokens} take up to {num_bytes} bytes of keys and values, the limit is "
                f"{self.max_kv_bytes}; lower max_new_tokens or num_beams, or raise the limit"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A job at work.

    context: the ids in front of its answer, as rules see them. generator: where a sample is drawn from.
    """

    job: DecodeJob
    extent: Extent
    context: Sequence[int]
    generator: torch.Generator | None


def build_task(job: DecodeJob, language_model: LanguageModel) -> Task:
    num_soft_tokens, params = len(job.language_model_inputs), job.params
    extent = extent_of(num_soft_tokens + len(job.prompt_ids), params)
    context = language_model.answer_context(num_soft_tokens, job.prompt_ids)
    generator = _build_generator(params.seed, language_model.device) if params.do_sample else None
    return Task(job, extent, context, generator)


def extent_of(num_prefix_tokens: int, params: GenerationParams) -> Extent:
    return Extent(num_prefix_tokens, params.num_rows, params.max_new_tokens)


def _build_generator(seed: int | None, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
