"""Applies one job's rules to the scores of its next tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.decoding.params import GenerationParams


class ScoreProcessor:
    """transformers' own processors, in its own order, over the sequences of one job.

    context: the ids in front of the answer, as `LanguageModel.answer_context` gives them.
    """

    def __init__(
        self,
        params: GenerationParams,
        context: Sequence[int],
        eos_token_ids: Sequence[int],
        device: torch.device,
    ) -> None:
        self._context = list(context)
        self._device = device
        self._min_new_tokens = params.min_new_tokens
        self._may_forbid_all = params.no_repeat_ngram_size > 0
        self._penalties = _build_penalties(params)
        self._eos = torch.tensor(eos_token_ids, device=device)
        self._min_length = MinNewTokensLengthLogitsProcessor(
            len(context), params.min_new_tokens, self._eos, device=str(device)
        )
        self._warpers = _build_warpers(params) if params.do_sample else []

    @property
    def is_plain(self) -> bool:
        """Whether all it ever does is to keep an answer from ending before its least length."""
        return not (self._penalties or self._warpers)

    def forbid_end(self, scores: Tensor, num_tokens: int) -> None:
        """Rules out, in place, that answers of so many tokens end, if too few; scores: [R, N]."""
        if num_tokens < self._min_new_tokens:
            scores[:, self._eos] = -torch.inf

    def __call__(self, scores: Tensor, answers: Sequence[Sequence[int]]) -> Tensor:
        """Gives the [R, N] scores of the next token of R answers that are all of one length."""
        processors = list(self._penalties)
        if len(answers[0]) < self._min_new_tokens:  # afterwards it would only copy the scores
            processors.append(self._min_length)
        processors += self._warpers
        if not processors:
            return scores
        input_ids = torch.tensor([[*self._context, *answer] for answer in answers], device=self._device)
        scores = LogitsProcessorList(processors)(input_ids, scores)
        return self._let_end(scores) if self._may_forbid_all else scores

    def _let_end(self, scores: Tensor) -> Tensor:
        """Has a row end where the rules forbid every token, for nothing could be drawn from it."""
        forbidden = scores.isneginf().all(dim=-1, keepdim=True)  # [R, 1]
        return torch.where(forbidden & self._is_end(scores), 0.0, scores)

    def _is_end(self, scores: Tensor) -> Tensor:
        return torch.isin(torch.arange(scores.shape[-1], device=scores.device), self._eos)


def _build_penalties(params: GenerationParams) -> list[LogitsProcessor]:
    penalties: list[LogitsProcessor] = []
    if params.repetition_penalty != 1.0:
        penalties.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    if params.no_repeat_ngram_size > 0:
        penalties.append(NoRepeatNGramLogitsProcessor(params.no_repeat_ngram_size))
    return penalties


def _build_warpers(params: GenerationParams) -> list[LogitsProcessor]:
    warpers: list[LogitsProcessor] = []
    if params.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(float(params.top_p)))
    return warpers
