"""One step of beam search, greedy search and sampling, for all sequences at once.

Beam search decides as transformers' `generate` does. Only a hypothesis that ranks among the first `num_beams`
of a step may end there, and enough candidates are ranked that `num_beams` are left to go on. Scores are
float32, as in the reference.
"""

from dataclasses import dataclass

import numpy as np

from model.generation.batched_params import BoolArray, FloatArray
from model.generation.beam_search_state import BeamSearchState
from model.generation.beams import Beams, rank
from model.language import IntArray


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tokens that may continue each beam, [J, W, k]; log_probs: -inf where the beam is inactive."""

    token_ids: IntArray
    log_probs: FloatArray


def update_beams(state: BeamSearchState, candidates: Candidates) -> None:
    """Continue, finish or drop the beams of all sequences by the candidates of one step."""
    if state.num_tokens.max() == state.running.token_ids.shape[2]:
        state.resize()
    # In its first step, a sequence has one row for all its beams.
    previous_rows = state.running.is_active.cumsum(axis=1) - 1
    previous_rows[state.num_tokens == 0] = 0
    num_sequences, beam_width = state.running.scores.shape
    parents = np.tile(np.arange(beam_width), (num_sequences, 1))
    (searched,) = state.params.is_beam_search.nonzero()
    (independent,) = (~state.params.is_beam_search).nonzero()
    if len(searched):
        parents[searched] = _update_beam_search(state, searched, candidates)
    if len(independent):
        _update_independent(state, independent, candidates)
    state.num_tokens = state.num_tokens + 1
    state.parents = np.take_along_axis(previous_rows, parents, 1)


def _update_independent(state: BeamSearchState, sequences: IntArray, candidates: Candidates) -> None:
    """Continue greedy and sampled sequences, each beam by its one candidate."""
    previous = state.running.select(sequences)
    token_ids, log_probs = candidates.token_ids[sequences, :, 0], candidates.log_probs[sequences, :, 0]
    beams = np.tile(np.arange(previous.scores.shape[1]), (len(sequences), 1))
    extended = previous.extend(beams, token_ids, log_probs, previous.scores + log_probs)
    ends = previous.is_active & _ends(state, sequences, token_ids)
    state.running.write(sequences, extended.where(previous.is_active & ~ends, extended.scores))
    ended = extended.where(ends, _length_penalised(state, sequences, extended.scores))
    finished = state.finished.select(sequences)
    state.finished.write(sequences, finished.concatenate(ended).best(finished.scores.shape[1]))


def _update_beam_search(state: BeamSearchState, sequences: IntArray, candidates: Candidates) -> IntArray:
    """Split each sequence's best candidates into hypotheses that end and beams that go on.

    Returns the parents of those beams, [J, W].
    """
    previous, beam_width = state.running.select(sequences), state.params.beam_width[sequences, None]
    num_candidates = state.num_candidates[sequences, None]
    totals = (candidates.log_probs[sequences] + previous.scores[:, :, None]).reshape(len(sequences), -1)
    best = rank(totals)[:, : num_candidates.max()]  # [J, c]
    totals, parents = np.take_along_axis(totals, best, 1), best // candidates.token_ids.shape[2]
    token_ids = np.take_along_axis(candidates.token_ids[sequences].reshape(len(sequences), -1), best, 1)
    log_probs = np.take_along_axis(candidates.log_probs[sequences].reshape(len(sequences), -1), best, 1)
    ranks = np.arange(best.shape[1])
    is_candidate = ~np.isneginf(totals) & (ranks < num_candidates)
    ends = _ends(state, sequences, token_ids)
    continues = is_candidate & ~ends
    continues &= continues.cumsum(axis=1) <= beam_width
    extended = previous.extend(parents, token_ids, log_probs, totals)
    penalised = _length_penalised(state, sequences, totals)
    _finish(state, sequences, extended.where(is_candidate & ends & (ranks < beam_width), penalised))
    best_running = penalised[np.arange(len(sequences)), continues.argmax(axis=1)]
    continues &= ~_is_search_done(state, sequences, best_running)[:, None]
    selected = np.argsort(~continues, axis=1, kind="stable")[:, : previous.scores.shape[1]]
    running = extended.where(continues, totals).gather(selected)
    state.running.write(sequences, running.resize(*previous.token_ids.shape))
    return _pad_right(np.take_along_axis(parents, selected, 1), previous.scores.shape[1])


def _finish(state: BeamSearchState, sequences: IntArray, hypotheses: Beams) -> None:
    """Keep the best of the finished hypotheses and the new ones, as many as the sequence has beams."""
    if not hypotheses.is_active.any():
        return
    finished = state.finished.select(sequences)
    width = finished.scores.shape[1]
    best = finished.concatenate(hypotheses).best(width)
    is_kept = np.arange(width) < state.params.beam_width[sequences, None]
    state.finished.write(sequences, best.where(is_kept, best.scores))


def _is_search_done(state: BeamSearchState, sequences: IntArray, best_running: FloatArray) -> BoolArray:
    """Return whether no better hypothesis is expected, [J].

    The best running score is penalised for its present length. With a positive length penalty a longer
    hypothesis might still score higher; the reference does not wait for it, and neither do we.
    """
    worst_finished = state.finished.scores[sequences, state.params.beam_width[sequences] - 1]
    is_better = best_running > worst_finished
    return ~np.isneginf(worst_finished) & (state.params.early_stopping[sequences] | ~is_better)


def _ends(state: BeamSearchState, sequences: IntArray, token_ids: IntArray) -> BoolArray:
    is_last = state.num_tokens[sequences] + 1 == state.params.max_new_tokens[sequences]
    return np.isin(token_ids, state.eos_token_ids) | is_last[:, None]


def _length_penalised(state: BeamSearchState, sequences: IntArray, scores: FloatArray) -> FloatArray:
    """Return [J, k] log-probabilities / length ** length_penalty."""
    lengths = (state.num_tokens[sequences] + 1).astype(np.float64)
    return scores / (lengths ** state.params.length_penalty[sequences]).astype(np.float32)[:, None]


def _pad_right(array: IntArray, width: int) -> IntArray:
    return np.pad(array, ((0, 0), (0, width - array.shape[1])))
