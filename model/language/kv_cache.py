"""The columns of growing texts: where their keys and values lie, and which row sees which."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache

Ids = NDArray[np.int64]

_COLUMNS = 16  # that a table grows by, so that shapes come again


class Layer(NamedTuple):
    """Keys and values of all sequences in one layer, [J, H, C, K] each."""

    keys: Tensor
    values: Tensor


def parts(cache: Cache, spans: Sequence[slice]) -> list[list[Layer]]:
    """Gives what each sequence has in the layers of a cache: the columns of its span, [H, S, K] each."""
    return [
        [Layer(layer.keys[number, :, span], layer.values[number, :, span]) for layer in cache.layers]
        for number, span in enumerate(spans)
    ]


class Lines:
    """Room for the columns of sequences in all layers."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def reserve(self, num_sequences: int, num_columns: int, like: Sequence[Layer]) -> None:
        """Makes room, keeping what there is; like: tensors of the types and on the devices wanted."""
        if not self.layers:
            self.layers = [Layer(*(tensor[None, :, :0] for tensor in layer)) for layer in like]
        sequences, columns = self.shape
        if num_sequences > sequences or num_columns > columns:
            self._reshape(*room(num_sequences, num_columns))

    @property
    def shape(self) -> tuple[int, int]:
        """The sequences and columns that there is room for."""
        if not self.layers:
            return 0, 0
        sequences, _, columns, _ = self.layers[0].keys.shape
        return sequences, columns

    def shrink(self, num_sequences: int, num_columns: int, *, most: int) -> None:
        """Gives room back where it is for more than `most` columns in all, but for what is in use."""
        if math.prod(self.shape) > most:
            self._reshape(*room(num_sequences, num_columns))

    def _reshape(self, sequences: int, columns: int) -> None:
        for number, layer in enumerate(self.layers):  # one by one: no more than one is there twice
            self.layers[number] = Layer(*(_moved(tensor, sequences, columns) for tensor in layer))

    def put(self, sequence: int, layers: Sequence[Layer]) -> None:
        """Writes the first columns of a sequence; layers: [H, S, K] each."""
        for held, new in zip(self.layers, layers, strict=True):
            for target, source in zip(held, new, strict=True):
                target[sequence, :, : source.shape[1]] = source
                target[sequence, :, source.shape[1] :] = 0  # a sequence gone may have left NaN

    def retain(self, order: Sequence[int]) -> None:
        assert all(new == old or old >= len(order) for new, old in enumerate(order)), "the last fill gaps"
        moved = [(new, old) for new, old in enumerate(order) if new != old]
        for tensor in (tensor for layer in self.layers for tensor in layer):
            for new, old in moved:
                tensor[new] = tensor[old]


def room(num_sequences: int, num_columns: int) -> tuple[int, int]:
    """Rounds up what is held, so that shapes come again and seldom grow."""
    return 1 << max(0, num_sequences - 1).bit_length(), -(-num_columns // 64) * 64


def _moved(tensor: Tensor, sequences: int, columns: int) -> Tensor:
    """Gives a copy of [J, H, C, K] keys with more room, or less where it is no longer needed."""
    grown = tensor.new_zeros(sequences, tensor.shape[1], columns, tensor.shape[3])
    kept = tensor[:sequences, :, :columns]
    grown[: kept.shape[0], :, : kept.shape[2]] = kept
    return grown


class Sight:
    """Which row of a sequence sees which column.

    table: [J, W, C]. positions: [J, C], in its text, of the token in a column. lengths: [J], of the texts.
    """

    def __init__(self) -> None:
        self.table: NDArray[np.bool_] = np.zeros((0, 1, 0), bool)
        self.positions: Ids = np.zeros((0, 0), np.int64)
        self.lengths: Ids = np.zeros(0, np.int64)
        self._widths: Ids = np.zeros(0, np.int64)

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of sequences and columns."""
        return self.table.shape[0], self.table.shape[2]

    def append(self, length: int, width: int) -> None:
        """Takes a sequence in, whose first row sees a prefix of so many columns."""
        sequence, rows, columns = self.table.shape
        self._pad(1, max(0, width - rows), max(0, _rounded(length) - columns))
        self.table[sequence, 0, :length] = True
        self.positions[sequence, :length] = np.arange(length)
        self.lengths = np.append(self.lengths, length)
        self._widths = np.append(self._widths, width)

    def retain(self, order: Sequence[int]) -> None:
        index = np.array(order, dtype=np.int64)
        self.lengths, self._widths = self.lengths[index], self._widths[index]
        rows = self._widths.max(initial=1)
        columns = _rounded(int(np.flatnonzero(self.table[index].any(axis=(0, 1))).max(initial=-1)) + 1)
        self.table = self.table[index, :rows, :columns]
        self.positions = self.positions[index, :columns]

    def grow(self, sequences: Ids, slots: Ids, parents: Ids) -> Ids:
        """Has R rows see what their parents saw, and a free column each; gives those columns, [R]."""
        seen = self.table[sequences, parents]  # [R, C]
        self.table[:] = False
        self.table[sequences, slots] = seen
        wanted = np.bincount(sequences, minlength=len(self.table))  # [J]
        missing = (wanted - (~self.table.any(axis=1)).sum(axis=1)).max()
        if missing > 0:
            self._pad(0, 0, _rounded(missing))
        free = ~self.table.any(axis=1)  # [J, C]
        columns: Ids = np.argsort(~free, axis=1, kind="stable")[sequences, slots]
        self.table[sequences, slots, columns] = True
        self.positions[sequences, columns] = self.lengths[sequences]
        self.lengths = self.lengths + 1
        return columns

    def _pad(self, sequences: int, rows: int, columns: int) -> None:
        self.table = np.pad(self.table, ((0, sequences), (0, rows), (0, columns)))
        self.positions = np.pad(self.positions, ((0, sequences), (0, columns)))


def _rounded(num_columns: int) -> int:
    return -(-num_columns // _COLUMNS) * _COLUMNS
