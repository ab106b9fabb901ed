"""A request to the decoder, its result, and the sequence that is scheduled for it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.generation.params import GenerationParams
from model.language import LanguageModel, MemoryRequirement


@dataclass(frozen=True, slots=True, eq=False)
class DecodeRequest:
    """One image and one prompt to be continued.

    language_model_inputs: [Q, L] soft tokens. prompt_ids: the prompt with its special tokens, as
    `LanguageModel.tokenize` returns it. Two requests are never equal, so a request can be a key.
    """

    language_model_inputs: Tensor
    prompt_ids: tuple[int, ...]
    params: GenerationParams


@dataclass(frozen=True, slots=True)
class Generation:
    """One generated answer.

    token_ids: the new tokens, the end token included where there is one; num_tokens: their number.
    score: log-probability / num_tokens ** length_penalty. For beams it is transformers' `sequences_scores`,
    of the log-probabilities after the logits processors; with one beam, of the bare model's.
    log_probs: of each token; their sum is the log-probability. finish_reason: "stop" where the model ended
    the answer, "length" where max_new_tokens did.
    """

    text: str
    token_ids: tuple[int, ...]
    score: float
    num_tokens: int
    finish_reason: Literal["stop", "length"]
    log_probs: tuple[float, ...] = ()

    @property
    def is_finite(self) -> bool:
        """Whether all its numbers are finite. Damaged weights, or an overflow, give others."""
        return all(map(math.isfinite, (self.score, *self.log_probs)))


@dataclass(frozen=True, slots=True, eq=False)
class ScheduledSequence:
    """A request in the decoder.

    context: the ids in front of its answer, for the logits processors. generator: of a sampled sequence.
    """

    request: DecodeRequest
    requirement: MemoryRequirement
    context: Sequence[int]
    generator: torch.Generator | None


def build_sequence(request: DecodeRequest, language_model: LanguageModel) -> ScheduledSequence:
    """Build the sequence of a request."""
    num_soft_tokens, params = len(request.language_model_inputs), request.params
    requirement = memory_requirement(num_soft_tokens + len(request.prompt_ids), params)
    context = language_model.answer_context(num_soft_tokens, request.prompt_ids)
    generator = _build_generator(params.seed, language_model.device) if params.do_sample else None
    return ScheduledSequence(request, requirement, context, generator)


def memory_requirement(num_prefix_tokens: int, params: GenerationParams) -> MemoryRequirement:
    """Return the memory requirement of a request with so many image and prompt tokens together."""
    return MemoryRequirement(num_prefix_tokens, params.num_rows, params.max_new_tokens)


def build_generation(
    language_model: LanguageModel, token_ids: tuple[int, ...], log_probs: tuple[float, ...], score: float
) -> Generation:
    """Build the generation of a finished hypothesis, with its text and its reason to end."""
    is_ended = token_ids[-1] in language_model.eos_token_ids
    return Generation(
        text=language_model.decode_tokens(token_ids),
        token_ids=token_ids,
        score=score,
        num_tokens=len(token_ids),
        finish_reason="stop" if is_ended else "length",
        log_probs=log_probs,
    )


def _build_generator(seed: int | None, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
