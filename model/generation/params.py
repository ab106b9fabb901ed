"""Generation parameters, with the meaning they have in transformers' `generate`."""

from dataclasses import dataclass
from typing import Final

from model.errors import InvalidParamsError

MAX_BEAMS = 16

# Inclusive. min_new_tokens is at most max_new_tokens besides.
BOUNDS: Final[dict[str, tuple[float, float]]] = {
    "num_beams": (1, MAX_BEAMS),
    "num_return_sequences": (1, MAX_BEAMS),
    "max_new_tokens": (1, 2**20),  # the language model's positions are the real limit
    "length_penalty": (-5.0, 5.0),  # 2048 tokens ** 5 is still a float32
    "repetition_penalty": (0.1, 10.0),
    "no_repeat_ngram_size": (0, 2**20),
    "temperature": (0.01, 100.0),
    "top_p": (0.01, 1.0),
    "top_k": (0, 2**20),
    "seed": (0, 2**63 - 1),
}


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """The parameters of one request; each request of a batch has its own.

    num_beams: hypotheses kept by beam search; 1 is greedy search, or sampling with `do_sample`.
    num_return_sequences: answers to return, at most `num_beams` unless sampling.
    max_new_tokens, min_new_tokens: of the answer, its end token included in the first.
    length_penalty: a beam's score is its log-probability / (number of tokens ** length_penalty).
    repetition_penalty: above 1 makes tokens of prompt and answer less likely to be repeated.
    no_repeat_ngram_size: an n-gram of this size occurs once only; 0: off.
    early_stopping: end as soon as `num_beams` answers are complete, even if better ones may follow.
    temperature, top_p, top_k: of sampling; top_k 0 is off. seed: None draws a fresh one.
    """

    num_beams: int = 5
    num_return_sequences: int = 1
    max_new_tokens: int = 30
    min_new_tokens: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    early_stopping: bool = False
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 0
    seed: int | None = None

    @property
    def num_rows(self) -> int:
        """The rows of the batch that the request occupies: its beams or samples."""
        return max(self.num_beams, self.num_return_sequences)

    def validate(self) -> None:
        """Raise InvalidParamsError, naming value, limit and cure, where a parameter is out of its bounds."""
        for name, (low, high) in {**BOUNDS, "min_new_tokens": (0, self.max_new_tokens)}.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # written so that NaN is refused too
                raise InvalidParamsError(f"{name} is {value!s:.60}; choose one between {low} and {high}")
        if self.do_sample and self.num_beams != 1:
            raise InvalidParamsError(
                f"do_sample is on and num_beams is {self.num_beams}; sampling needs num_beams 1"
            )
        if not self.do_sample and self.num_return_sequences > self.num_beams:
            raise InvalidParamsError(
                f"num_return_sequences is {self.num_return_sequences} and num_beams {self.num_beams}; "
                "raise num_beams to at least as many, or set do_sample"
            )
