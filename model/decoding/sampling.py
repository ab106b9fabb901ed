"""One-beam search: the most likely token at each step, or one drawn from the distribution."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.decoding.params import GenerationParams
from model.decoding.processors import ScoreProcessor
from model.decoding.search import Continuation, Hypothesis, Scores, TokenIds


class Sampling:
    """Grows answers independently of each other: one greedily, or with `do_sample` any number at random.

    Every job has its own random generator, so what shares the batch does not change what is drawn. The score
    of an answer is made of the bare model's log-probabilities, whatever the processors did to them.
    """

    def __init__(
        self, params: GenerationParams, processor: ScoreProcessor, eos_token_ids: Sequence[int]
    ) -> None:
        self._params = params
        self._processor = processor
        self._eos_token_ids = frozenset(eos_token_ids)
        self._generator: torch.Generator | None = None
        self._running = [Hypothesis()] * params.num_rows
        self._finished: list[Hypothesis] = []

    def propose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.expand(len(self._running), -1)  # the first step has one row for all
        scores = self._processor(logits, [answer.token_ids for answer in self._running])
        if self._params.do_sample:
            probabilities = scores.softmax(dim=-1)
            token_ids = torch.multinomial(probabilities, 1, generator=self._generator_on(logits.device))
        else:
            token_ids = scores.argmax(dim=-1, keepdim=True)
        return logits.log_softmax(dim=-1).gather(1, token_ids), token_ids

    def accept(self, scores: Scores, token_ids: TokenIds) -> Sequence[Continuation]:
        is_first = not self._running[0].token_ids
        running: list[Hypothesis] = []
        continuations: list[Continuation] = []
        for row, (score, token_id) in enumerate(
            zip(scores[:, 0].tolist(), token_ids[:, 0].tolist(), strict=True)
        ):
            answer = self._running[row].extended(token_id, self._running[row].score + score)
            if token_id in self._eos_token_ids or len(answer.token_ids) == self._params.max_new_tokens:
                self._finished.append(answer)
            else:
                running.append(answer)
                continuations.append(Continuation(0 if is_first else row, token_id))
        self._running = running
        return continuations

    def answers(self) -> Sequence[Hypothesis]:
        penalised = [
            Hypothesis(answer.token_ids, answer.score / len(answer.token_ids) ** self._params.length_penalty)
            for answer in self._finished
        ]
        return sorted(penalised, key=lambda answer: -answer.score)

    def _generator_on(self, device: torch.device) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator(device)
            if self._params.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self._params.seed)
        return self._generator
