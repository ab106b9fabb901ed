"""The state of beam search, greedy search and sampling, for all sequences at once."""

from collections.abc import Sequence

import numpy as np

from model.generation.batched_params import BatchedParams, BoolArray
from model.generation.beams import Beams
from model.generation.logits_processors import PADDING_ID
from model.generation.params import GenerationParams
from model.language import DecodeInput, IntArray


class BeamSearchState:
    """J sequences, counted from 0 in the order they were appended.

    running: beams to be continued, by rank. finished: hypotheses that ended, best first. num_tokens: [J], of
    each running beam. parents: [J, W], the row that each beam continues, where the rows of the last step are
    counted without gaps.
    """

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self.eos_token_ids = np.array(eos_token_ids)
        self.params = BatchedParams.stack([])
        self.running = Beams.empty(0, 1, 1)
        self.finished = Beams.empty(0, 1, 1)
        self.num_tokens: IntArray = np.zeros(0, np.int64)
        self.parents: IntArray = np.zeros((0, 1), np.int64)
        self._contexts = _pad_left([])  # [J, P]

    def __len__(self) -> int:
        return len(self.num_tokens)

    @property
    def num_candidates(self) -> IntArray:
        """The candidates that a beam search ranks in one step, [J].

        Enough that `beam_width` of them go on, even if every other one ends.
        """
        return max(2, 1 + len(self.eos_token_ids)) * self.params.beam_width

    @property
    def is_done(self) -> BoolArray:
        """The sequences without a running beam, [J]."""
        return np.logical_not(self.running.is_active.any(axis=1))

    def append(self, params: Sequence[GenerationParams], contexts: Sequence[Sequence[int]]) -> None:
        """Add sequences. A beam search starts with one beam, sampling with all of its samples.

        contexts: the ids in front of each answer, which the rules about repetition count.
        """
        added = BatchedParams.stack(params)
        sequences = len(self.num_tokens) + np.arange(len(params))
        self.params = self.params.append(added)
        self.num_tokens = np.append(self.num_tokens, np.zeros(len(params), np.int64))
        self.resize()
        num_first = np.where(added.is_beam_search, 1, added.beam_width)
        beams = np.arange(self.running.scores.shape[1])
        self.running.scores[sequences] = np.where(
            beams < num_first[:, None], np.float32(0), np.float32(-np.inf)
        )
        self.parents = np.zeros(self.running.scores.shape, np.int64)
        self._contexts = _pad_left([*self._contexts, *map(np.array, contexts)])

    def resize(self) -> None:
        """Fit the arrays to the sequences, their beams and their tokens, with room for at least one more."""
        num_tokens = int(self.num_tokens.max(initial=0)) + 1
        shape = (len(self), int(self.params.beam_width.max(initial=1)), 1 << num_tokens.bit_length())
        self.running, self.finished = self.running.resize(*shape), self.finished.resize(*shape)

    def permute(self, order: Sequence[int]) -> None:
        """Permute and drop sequences: sequence i becomes what `order[i]` was."""
        sequences = np.array(order, dtype=np.int64)
        self.params = self.params.select(sequences)
        self.running, self.finished = self.running.select(sequences), self.finished.select(sequences)
        self.num_tokens, self.parents = self.num_tokens[sequences], self.parents[sequences]
        self._contexts = self._contexts[sequences]
        self.resize()

    def rows(self) -> tuple[IntArray, IntArray]:
        """Return the sequence and the beam of each running row, [R] each."""
        sequences, beams = np.nonzero(self.running.is_active)
        return sequences, beams

    def decode_input(self, sequences: IntArray, beams: IntArray) -> DecodeInput:
        """Return the newest token of [R] rows, whose sequences have at least one."""
        token_ids = self.running.token_ids[sequences, beams, self.num_tokens[sequences] - 1]
        return DecodeInput(sequences, self.parents[sequences, beams], token_ids)

    def histories(self, sequences: IntArray, beams: IntArray) -> IntArray:
        """Return the ids in front of each row's next token, [R, T], the newest last.

        [R, 0] where no rule needs them.
        """
        if not self.params.needs_history[sequences].any():
            return np.zeros((len(sequences), 0), np.int64)
        num_generated = self.num_tokens[sequences, None]
        generated = self.running.token_ids[sequences, beams, : num_generated.max()]
        ids = np.concatenate([self._contexts[sequences], generated], axis=1)
        # Shorter rows have unused places at the end: each row is shifted to the right by their number.
        positions = np.arange(ids.shape[1]) - (generated.shape[1] - num_generated)
        return np.where(positions >= 0, np.take_along_axis(ids, positions.clip(0), 1), PADDING_ID)


def _pad_left(contexts: Sequence[IntArray]) -> IntArray:
    """Stack sequences of ids, padded on the left."""
    width = max(map(len, contexts), default=0)
    return np.array(
        [np.pad(ids, (width - len(ids), 0), constant_values=PADDING_ID) for ids in contexts], np.int64
    ).reshape(len(contexts), width)
