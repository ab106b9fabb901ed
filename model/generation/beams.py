"""Beams of many sequences as arrays; every operation applies to all of them at once."""

from dataclasses import dataclass, fields

import numpy as np

from model.generation.batched_params import BoolArray, FloatArray
from model.language import IntArray


@dataclass(slots=True)
class Beams:
    """W beams of up to T tokens for each of J sequences.

    token_ids, log_probs: [J, W, T]. lengths: [J, W]. scores: [J, W], -inf where a beam is inactive.
    """

    token_ids: IntArray
    log_probs: FloatArray
    lengths: IntArray
    scores: FloatArray

    @classmethod
    def empty(cls, num_sequences: int, beam_width: int, num_tokens: int) -> "Beams":
        shape = (num_sequences, beam_width)
        return cls(
            np.zeros((*shape, num_tokens), np.int64),
            np.zeros((*shape, num_tokens), np.float32),
            np.zeros(shape, np.int64),
            np.full(shape, -np.inf, np.float32),
        )

    @property
    def is_active(self) -> BoolArray:
        """The active mask, [J, W]. A beam whose score is NaN is active, so that its caller sees it."""
        return ~np.isneginf(self.scores)

    def select(self, sequences: IntArray) -> "Beams":
        """Return the beams of some sequences."""
        return Beams(*(getattr(self, field.name)[sequences] for field in fields(self)))

    def write(self, sequences: IntArray, beams: "Beams") -> None:
        """Replace the beams of some sequences."""
        for field in fields(self):
            getattr(self, field.name)[sequences] = getattr(beams, field.name)

    def gather(self, indices: IntArray) -> "Beams":
        """Return, for each sequence, the beams at its [J, k] indices."""
        sequences = np.arange(len(indices))[:, None]
        return Beams(*(getattr(self, field.name)[sequences, indices] for field in fields(self)))

    def best(self, count: int) -> "Beams":
        """Return each sequence's beams of the highest scores, best first; of equal ones the earlier first."""
        return self.gather(rank(self.scores)[:, :count])

    def concatenate(self, others: "Beams") -> "Beams":
        """Return the beams of both, those of `others` last."""
        return Beams(
            *(
                np.concatenate([getattr(self, field.name), getattr(others, field.name)], axis=1)
                for field in fields(self)
            )
        )

    def where(self, mask: BoolArray, scores: FloatArray) -> "Beams":
        """Return the beams with new scores, inactive outside of `mask`."""
        return Beams(
            self.token_ids, self.log_probs, self.lengths, np.where(mask, scores, np.float32(-np.inf))
        )

    def extend(
        self, parents: IntArray, token_ids: IntArray, log_probs: FloatArray, scores: FloatArray
    ) -> "Beams":
        """Return copies of the parents with one token more; each argument: [J, k]."""
        extended = self.gather(parents)
        sequences, beams = np.indices(parents.shape)
        extended.token_ids[sequences, beams, extended.lengths] = token_ids
        extended.log_probs[sequences, beams, extended.lengths] = log_probs
        extended.lengths += 1
        extended.scores = scores
        return extended

    def resize(self, num_sequences: int, beam_width: int, num_tokens: int) -> "Beams":
        """Return the beams in arrays of this shape; what is beyond it is dropped."""
        resized = Beams.empty(num_sequences, beam_width, num_tokens)
        for field in fields(self):
            old, new = getattr(self, field.name), getattr(resized, field.name)
            common = tuple(slice(min(sizes)) for sizes in zip(old.shape, new.shape, strict=True))
            new[common] = old[common]
        return resized


def rank(scores: FloatArray) -> IntArray:
    """Return the indices of each row of [J, k] scores, best first; of equal ones the earlier first.

    -inf comes last, and before it NaN, which a broken model may produce.
    """
    keys = np.where(np.isnan(scores), np.finfo(np.float32).max, -scores)
    return np.argsort(keys, axis=1, kind="stable")
