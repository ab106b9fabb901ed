"""What the decoder is asked, and what it answers."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from model.decoding.params import GenerationParams


@dataclass(frozen=True, slots=True, eq=False)
class DecodeJob:
    """One image and one prompt to be continued.

    language_model_inputs: [Q, L] soft tokens. prompt_ids: the prompt with its special token, as
    `LanguageModel.tokenize` gives it. Two jobs are never equal, so a job can be a key.
    """

    language_model_inputs: Tensor
    prompt_ids: tuple[int, ...]
    params: GenerationParams


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer.

    token_ids: the new tokens, the end token included where there is one; num_tokens: how many.
    score: log-probability / num_tokens ** length_penalty. For beams it is transformers' `sequences_scores`,
    whose log-probabilities are those the rules left; for one-beam jobs those of the bare model.
    log_probs: of each token; their sum is the log-probability. finish_reason: "stop" where the model ended
    the answer, "length" where max_new_tokens did.
    """

    text: str
    token_ids: tuple[int, ...]
    score: float
    num_tokens: int
    finish_reason: Literal["stop", "length"]
    log_probs: tuple[float, ...] = ()
