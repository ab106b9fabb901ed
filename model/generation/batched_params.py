"""The parameters of many sequences as arrays, one entry for each."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from model.generation.params import GenerationParams
from model.language import IntArray

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class BatchedParams:
    """See `GenerationParams`; [J] each.

    beam_width: the beams or samples of a sequence. one_minus_top_p: 1 - top_p.
    """

    beam_width: IntArray
    is_beam_search: BoolArray
    max_new_tokens: IntArray
    min_new_tokens: IntArray
    length_penalty: NDArray[np.float64]
    early_stopping: BoolArray
    repetition_penalty: FloatArray
    no_repeat_ngram_size: IntArray
    do_sample: BoolArray
    temperature: FloatArray
    top_k: IntArray
    one_minus_top_p: FloatArray

    @classmethod
    def stack(cls, params: Sequence[GenerationParams]) -> "BatchedParams":
        return cls(
            beam_width=np.array([each.num_rows for each in params], np.int64),
            is_beam_search=np.array([each.num_beams > 1 for each in params], bool),
            max_new_tokens=np.array([each.max_new_tokens for each in params], np.int64),
            min_new_tokens=np.array([each.min_new_tokens for each in params], np.int64),
            length_penalty=np.array([each.length_penalty for each in params], np.float64),
            early_stopping=np.array([each.early_stopping for each in params], bool),
            repetition_penalty=np.array([each.repetition_penalty for each in params], np.float32),
            no_repeat_ngram_size=np.array([each.no_repeat_ngram_size for each in params], np.int64),
            do_sample=np.array([each.do_sample for each in params], bool),
            temperature=np.array([each.temperature for each in params], np.float32),
            top_k=np.array([each.top_k for each in params], np.int64),
            one_minus_top_p=np.array([1 - each.top_p for each in params], np.float32),
        )

    def select(self, indices: IntArray) -> "BatchedParams":
        return BatchedParams(*(getattr(self, field.name)[indices] for field in fields(self)))

    def append(self, others: "BatchedParams") -> "BatchedParams":
        return BatchedParams(
            *(np.append(getattr(self, field.name), getattr(others, field.name)) for field in fields(self))
        )

    @property
    def needs_history(self) -> BoolArray:
        """The sequences with a rule about tokens generated before."""
        return (self.repetition_penalty != 1) | (self.no_repeat_ngram_size > 0)
