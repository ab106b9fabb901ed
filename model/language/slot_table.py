"""The slot table: which slots of the KV cache each beam attends to."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.language.decoding_state import IntArray

_TABLE_SLOT_MULTIPLE = 16  # the table grows by as many slots, so that shapes recur


class SlotTable:
    """The attention mask of every beam over the slots of its sequence.

    mask: [J, W, C]. positions: [J, C], of the token in each slot within its text. lengths: [J], the tokens of
    each beam.
    """

    def __init__(self) -> None:
        self.mask: NDArray[np.bool_] = np.zeros((0, 1, 0), bool)
        self.positions: IntArray = np.zeros((0, 0), np.int64)
        self.lengths: IntArray = np.zeros(0, np.int64)
        self._beam_widths: IntArray = np.zeros(0, np.int64)

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of sequences and of slots."""
        return self.mask.shape[0], self.mask.shape[2]

    @property
    def num_used_slots(self) -> int:
        """The slots that some beam attends to, of all sequences."""
        return int(self.mask.any(axis=1).sum())

    def append(self, length: int, beam_width: int) -> None:
        """Add a sequence, whose first beam attends to a prefix of `length` slots."""
        sequence, num_beams, num_slots = self.mask.shape
        self._pad(1, max(0, beam_width - num_beams), max(0, _rounded_up(length) - num_slots))
        self.mask[sequence, 0, :length] = True
        self.positions[sequence, :length] = np.arange(length)
        self.lengths = np.append(self.lengths, length)
        self._beam_widths = np.append(self._beam_widths, beam_width)

    def permute(self, order: Sequence[int]) -> None:
        """Permute and drop sequences, see `DecodingState.permute`; cut off beams and slots out of use."""
        index = np.array(order, dtype=np.int64)
        self.lengths, self._beam_widths = self.lengths[index], self._beam_widths[index]
        num_beams = self._beam_widths.max(initial=1)
        last_used = np.flatnonzero(self.mask[index].any(axis=(0, 1))).max(initial=-1)
        num_slots = _rounded_up(int(last_used) + 1)
        self.mask = self.mask[index, :num_beams, :num_slots]
        self.positions = self.positions[index, :num_slots]

    def allocate(self, sequences: IntArray, beams: IntArray, parents: IntArray) -> IntArray:
        """Copy each beam's mask from its parent and allocate one slot per beam; return the slots, [R].

        A slot that no beam attends to any more is allocated again.
        """
        parent_masks = self.mask[sequences, parents]  # [R, C]
        self.mask[:] = False
        self.mask[sequences, beams] = parent_masks
        num_required = np.bincount(sequences, minlength=len(self.mask))  # [J]
        num_missing = (num_required - (~self.mask.any(axis=1)).sum(axis=1)).max()
        if num_missing > 0:
            self._pad(0, 0, _rounded_up(num_missing))
        is_free = ~self.mask.any(axis=1)  # [J, C]
        slots: IntArray = np.argsort(~is_free, axis=1, kind="stable")[sequences, beams]
        self.mask[sequences, beams, slots] = True
        self.positions[sequences, slots] = self.lengths[sequences]
        self.lengths = self.lengths + 1
        return slots

    def _pad(self, num_sequences: int, num_beams: int, num_slots: int) -> None:
        self.mask = np.pad(self.mask, ((0, num_sequences), (0, num_beams), (0, num_slots)))
        self.positions = np.pad(self.positions, ((0, num_sequences), (0, num_slots)))


def _rounded_up(num_slots: int) -> int:
    return -(-num_slots // _TABLE_SLOT_MULTIPLE) * _TABLE_SLOT_MULTIPLE
