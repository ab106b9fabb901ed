"""How far each job's search for an answer is: beam search, greedy search and sampling, for all jobs at once.

Beam search takes the decisions of transformers' `generate`: only a text that ranks among the first
`num_beams` of a step may end there, and so many more candidates are looked at that `num_beams` are left to go
on. Scores are float32, as the reference has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.generation.batched_params import Flags, Ids, ParamTable, Scores
from model.generation.beams import Texts, ranking
from model.generation.logits_processors import NOTHING
from model.generation.params import GenerationParams


@dataclass(frozen=True, slots=True)
class Proposals:
    """The tokens that may continue each text, [J, W, k]; log_probs: -inf where there is no such text."""

    token_ids: Ids
    log_probs: Scores


class Board:
    """J jobs, counted from 0 in the order they came in.

    running: what goes on, by rank; finished: the answers so far, best first. num_tokens: [J], of each
    running text. parents: [J, W], the row that each text goes on from, where rows of the last step are
    counted without gaps.
    """

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._eos_token_ids = np.array(eos_token_ids)
        self.params = ParamTable.of([])
        self.running = Texts.none(0, 1, 1)
        self.finished = Texts.none(0, 1, 1)
        self.num_tokens: Ids = np.zeros(0, np.int64)
        self.parents: Ids = np.zeros((0, 1), np.int64)
        self._contexts = _stacked([])  # [J, P]

    def __len__(self) -> int:
        return len(self.num_tokens)

    @property
    def num_candidates(self) -> Ids:
        """How many tokens a beam search looks at in a step, [J]."""
        return max(2, 1 + len(self._eos_token_ids)) * self.params.num_texts

    @property
    def is_done(self) -> Flags:
        """[J]."""
        return np.logical_not(self.running.present.any(axis=1))

    def append(self, params: Sequence[GenerationParams], contexts: Sequence[Sequence[int]]) -> None:
        """Takes jobs in. A beam search begins with one text, sampling with all of its own.

        contexts: the ids in front of each answer, which the rules about repetition count.
        """
        added = ParamTable.of(params)
        jobs = len(self.num_tokens) + np.arange(len(params))
        self.params = self.params.joined(added)
        self.num_tokens = np.append(self.num_tokens, np.zeros(len(params), np.int64))
        self._resize()
        num_first = np.where(added.is_beam_search, 1, added.num_texts)
        texts = np.arange(self.running.scores.shape[1])
        self.running.scores[jobs] = np.where(texts < num_first[:, None], np.float32(0), np.float32(-np.inf))
        self.parents = np.zeros(self.running.scores.shape, np.int64)
        self._contexts = _stacked([*self._contexts, *map(np.array, contexts)])

    def _resize(self) -> None:
        num_tokens = int(self.num_tokens.max(initial=0)) + 1
        room = (len(self), int(self.params.num_texts.max(initial=1)), 1 << num_tokens.bit_length())
        self.running, self.finished = self.running.resized(*room), self.finished.resized(*room)

    def retain(self, order: Sequence[int]) -> None:
        """Makes job i what `order[i]` was; those not named are forgotten."""
        jobs = np.array(order, dtype=np.int64)
        self.params = self.params.of_jobs(jobs)
        self.running, self.finished = self.running.of_jobs(jobs), self.finished.of_jobs(jobs)
        self.num_tokens, self.parents = self.num_tokens[jobs], self.parents[jobs]
        self._contexts = self._contexts[jobs]
        self._resize()

    def rows(self) -> tuple[Ids, Ids]:
        """Gives job and text of each running row, [R] each."""
        jobs, texts = np.nonzero(self.running.present)
        return jobs, texts

    def histories(self, jobs: Ids, texts: Ids) -> Ids:
        """Gives the ids in front of each row's next token, [R, T], the newest last.

        [R, 0] where no rule looks back.
        """
        if not self.params.needs_history[jobs].any():
            return np.zeros((len(jobs), 0), np.int64)
        num_said = self.num_tokens[jobs, None]
        said = self.running.token_ids[jobs, texts, : num_said.max()]
        ids = np.concatenate([self._contexts[jobs], said], axis=1)
        # What is not said yet stands at the end: every row is moved by as much to the right.
        at = np.arange(ids.shape[1]) - (said.shape[1] - num_said)
        return np.where(at >= 0, np.take_along_axis(ids, at.clip(0), 1), NOTHING)

    def accept(self, proposals: Proposals) -> None:
        """Takes one step's proposals for all jobs in."""
        if self.num_tokens.max() == self.running.token_ids.shape[2]:
            self._resize()
        # At its beginning, a job has one row for all its texts.
        former_rows = self.running.present.cumsum(axis=1) - 1
        former_rows[self.num_tokens == 0] = 0
        num_jobs, num_texts = self.running.scores.shape
        parents = np.tile(np.arange(num_texts), (num_jobs, 1))
        (beams,) = self.params.is_beam_search.nonzero()
        (others,) = (~self.params.is_beam_search).nonzero()
        if len(beams):
            parents[beams] = self._accept_beams(beams, proposals)
        if len(others):
            self._accept_single(others, proposals)
        self.num_tokens = self.num_tokens + 1
        self.parents = np.take_along_axis(former_rows, parents, 1)

    def _accept_single(self, jobs: Ids, proposals: Proposals) -> None:
        """Continues texts that do not feel each other, each by its one proposal."""
        before = self.running.of_jobs(jobs)
        token_ids, log_probs = proposals.token_ids[jobs, :, 0], proposals.log_probs[jobs, :, 0]
        texts = np.tile(np.arange(before.scores.shape[1]), (len(jobs), 1))
        grown = before.extended(texts, token_ids, log_probs, before.scores + log_probs)
        ends = before.present & self._ends(jobs, token_ids)
        self.running.put(jobs, grown.where(before.present & ~ends, grown.scores))
        answers = grown.where(ends, self._penalised(jobs, grown.scores))
        finished = self.finished.of_jobs(jobs)
        self.finished.put(jobs, finished.beside(answers).best(finished.scores.shape[1]))

    def _accept_beams(self, jobs: Ids, proposals: Proposals) -> Ids:
        """Parts the best candidates of each job into those that end here and those that go on."""
        before, num_texts = self.running.of_jobs(jobs), self.params.num_texts[jobs, None]
        num_candidates = self.num_candidates[jobs, None]
        totals = (proposals.log_probs[jobs] + before.scores[:, :, None]).reshape(len(jobs), -1)
        best = ranking(totals)[:, : num_candidates.max()]  # [J, c]
        totals, parents = np.take_along_axis(totals, best, 1), best // proposals.token_ids.shape[2]
        token_ids = np.take_along_axis(proposals.token_ids[jobs].reshape(len(jobs), -1), best, 1)
        log_probs = np.take_along_axis(proposals.log_probs[jobs].reshape(len(jobs), -1), best, 1)
        ranks = np.arange(best.shape[1])
        is_candidate = ~np.isneginf(totals) & (ranks < num_candidates)
        ends = self._ends(jobs, token_ids)
        goes_on = is_candidate & ~ends
        goes_on &= goes_on.cumsum(axis=1) <= num_texts
        candidates = before.extended(parents, token_ids, log_probs, totals)
        penalised = self._penalised(jobs, totals)
        self._finish(jobs, candidates.where(is_candidate & ends & (ranks < num_texts), penalised))
        best_running = penalised[np.arange(len(jobs)), goes_on.argmax(axis=1)]
        goes_on &= ~self._is_settled(jobs, best_running)[:, None]
        chosen = np.argsort(~goes_on, axis=1, kind="stable")[:, : before.scores.shape[1]]
        running = candidates.where(goes_on, totals).take(chosen)
        self.running.put(jobs, running.resized(*before.token_ids.shape))
        return _widened(np.take_along_axis(parents, chosen, 1), before.scores.shape[1])

    def _finish(self, jobs: Ids, texts: Texts) -> None:
        """Keeps the best of the answers there were and those that ended now, as many as the job has beams."""
        if not texts.present.any():
            return
        finished = self.finished.of_jobs(jobs)
        width = finished.scores.shape[1]
        kept = finished.beside(texts).best(width)
        is_kept = np.arange(width) < self.params.num_texts[jobs, None]
        self.finished.put(jobs, kept.where(is_kept, kept.scores))

    def _is_settled(self, jobs: Ids, best_running: Scores) -> Flags:
        """Says whether no better answer is expected, [J].

        The best running score is penalised for the length it has now. With a positive length penalty a
        longer answer might still overtake; the reference does not wait for it, nor do we.
        """
        worst = self.finished.scores[jobs, self.params.num_texts[jobs] - 1]
        is_better = best_running > worst
        return ~np.isneginf(worst) & (self.params.early_stopping[jobs] | ~is_better)

    def _ends(self, jobs: Ids, token_ids: Ids) -> Flags:
        is_last = self.num_tokens[jobs] + 1 == self.params.max_new_tokens[jobs]
        return np.isin(token_ids, self._eos_token_ids) | is_last[:, None]

    def _penalised(self, jobs: Ids, scores: Scores) -> Scores:
        """Gives [J, k] log-probabilities / length ** length_penalty."""
        lengths = (self.num_tokens[jobs] + 1).astype(np.float64)
        return scores / (lengths ** self.params.length_penalty[jobs]).astype(np.float32)[:, None]


def _widened(array: Ids, width: int) -> Ids:
    return np.pad(array, ((0, 0), (0, width - array.shape[1])))


def _stacked(contexts: Sequence[Ids]) -> Ids:
    """Gives sequences of ids as one array, filled up on their left."""
    width = max(map(len, contexts), default=0)
    return np.array(
        [np.pad(ids, (width - len(ids), 0), constant_values=NOTHING) for ids in contexts], np.int64
    ).reshape(len(contexts), width)
