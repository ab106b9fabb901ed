"""Parameters of many jobs as arrays, an entry for each job."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from model.generation.params import GenerationParams

Ids = NDArray[np.int64]
Scores = NDArray[np.float32]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ParamTable:
    """See `GenerationParams`; [J] each.

    num_texts: those a job works on, beams or samples. tail: 1 - top_p.
    """

    num_texts: Ids
    is_beam_search: Flags
    max_new_tokens: Ids
    min_new_tokens: Ids
    length_penalty: NDArray[np.float64]
    early_stopping: Flags
    repetition_penalty: Scores
    no_repeat_ngram_size: Ids
    do_sample: Flags
    temperature: Scores
    top_k: Ids
    tail: Scores

    @classmethod
    def of(cls, params: Sequence[GenerationParams]) -> "ParamTable":
        return cls(
            num_texts=np.array([each.num_rows for each in params], np.int64),
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
            tail=np.array([1 - each.top_p for each in params], np.float32),
        )

    def of_jobs(self, jobs: Ids) -> "ParamTable":
        return ParamTable(*(getattr(self, field.name)[jobs] for field in fields(self)))

    def joined(self, others: "ParamTable") -> "ParamTable":
        return ParamTable(
            *(np.append(getattr(self, field.name), getattr(others, field.name)) for field in fields(self))
        )

    @property
    def needs_history(self) -> Flags:
        """Where what was said before counts."""
        return (self.repetition_penalty != 1) | (self.no_repeat_ngram_size > 0)
