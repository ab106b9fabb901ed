"""Beam search, decision for decision that of transformers' `generate`."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.decoding.params import GenerationParams
from model.decoding.processors import ScoreProcessor
from model.decoding.search import Continuation, Hypothesis, Scores, TokenIds


class BeamSearch:
    """Keeps the `num_beams` most likely sequences, and the best `num_beams` of those that ended.

    Only a sequence that ranks among the first `num_beams` of a step may end; so many more candidates are
    looked at that `num_beams` are left to go on. Scores are float32, as the reference has them.
    """

    def __init__(
        self, params: GenerationParams, processor: ScoreProcessor, eos_token_ids: Sequence[int]
    ) -> None:
        self._params = params
        self._processor = processor
        self._eos_token_ids = frozenset(eos_token_ids)
        self._num_candidates = max(2, 1 + len(self._eos_token_ids)) * params.num_beams
        self._running = [Hypothesis()]
        self._finished: list[Hypothesis] = []

    def propose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        # The best of all rows are among the best of each, and those few are all that leaves the device.
        count = min(self._num_candidates, logits.shape[-1])
        answers = [beam.token_ids for beam in self._running]
        if not self._processor.is_plain:
            return torch.topk(self._processor(logits.log_softmax(dim=-1), answers), count)
        totals = logits.logsumexp(dim=-1, keepdim=True)  # instead of a second copy of all scores
        self._processor.forbid_end(logits, len(answers[0]))
        scores, token_ids = torch.topk(logits, count)
        return scores - totals, token_ids

    def accept(self, scores: Scores, token_ids: TokenIds) -> Sequence[Continuation]:
        scores = scores + np.array([beam.score for beam in self._running], dtype=np.float32)[:, None]
        best = np.argsort(-scores, axis=None, kind="stable")[: self._num_candidates]
        parents = (best // scores.shape[1]).tolist()
        candidates = [
            Continuation(parent, token)
            for parent, token in zip(parents, token_ids.flat[best].tolist(), strict=True)
        ]
        return self._select(candidates, scores.flat[best])

    def answers(self) -> Sequence[Hypothesis]:
        return self._finished[: self._params.num_return_sequences]

    def _select(self, candidates: Sequence[Continuation], scores: Scores) -> Sequence[Continuation]:
        """Parts the candidates, best first, into those that end here and those that go on."""
        num_tokens = len(self._running[0].token_ids) + 1
        is_last = num_tokens == self._params.max_new_tokens
        penalised = scores / num_tokens**self._params.length_penalty
        going_on: list[int] = []
        for rank, candidate in enumerate(candidates):
            if not (is_last or candidate.token_id in self._eos_token_ids):
                going_on.append(rank)
            elif rank < self._params.num_beams:
                self._finished.append(self._extend(candidate, penalised[rank]))
        going_on = going_on[: self._params.num_beams]
        self._finished.sort(key=lambda answer: -answer.score)
        del self._finished[self._params.num_beams :]
        if not going_on or self._is_done(best_running=penalised[going_on[0]]):
            return ()
        self._running = [self._extend(candidates[rank], scores[rank]) for rank in going_on]
        return [candidates[rank] for rank in going_on]

    def _extend(self, candidate: Continuation, score: np.float32) -> Hypothesis:
        return self._running[candidate.parent].extended(candidate.token_id, float(score))

    def _is_done(self, *, best_running: np.float32) -> bool:
        """Whether no better answer is expected.

        The best running score is penalised for the length it has now. With a positive length penalty a
        longer answer might still overtake; the reference does not wait for it, nor do we.
        """
        if len(self._finished) < self._params.num_beams:
            return False
        return self._params.early_stopping or not best_running > self._finished[-1].score
