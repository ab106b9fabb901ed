"""Batches that the stages train on, and the samplers that draw them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PairBatch:
    """B image-text pairs of stage 1.

    `image_features` [B, P, V]; `input_ids` and `attention_mask` [B, T]; `matches` [B, B] as in `losses`.
    """

    image_features: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    matches: Tensor

    def to(self, device: torch.device) -> "PairBatch":
        return PairBatch(*(getattr(self, name).to(device) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class QaTurn:
    """A prompt (may be empty), its answer, and the loss weight of each answer token.

    A decoder-only language model continues the prompt with the answer; an encoder-decoder encodes the prompt
    and decodes the answer.
    """

    prompt: str
    answer: str
    weight: float


@dataclass(frozen=True, slots=True)
class QaBatch:
    """B images of stage 2, `image_features` [B, P, V], each with its QA turns."""

    image_features: Tensor
    qa_turns: Sequence[Sequence[QaTurn]]


PairSampler = Callable[[int, np.random.Generator], PairBatch]  # of step and generator
QaSampler = Callable[[int, np.random.Generator], QaBatch]
