"""The stage-2 objective of a decoder-only language model (OPT, Llama, Qwen2): the QA turns of an image."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model.language import LanguageModel
from training.data.batches import QaTurn
from training.data.packing import WeightedText, pack_texts
from training.stages.packed_decoding import can_pack, lm_loss, run_alone, run_packed
from training.stages.turn_tokenizer import TurnTokenizer


@dataclass(frozen=True, slots=True)
class DecoderOnlyObjective:
    """Language modelling of the answers of QA turns behind a soft prompt.

    max_text_tokens: of prompt and answer, special tokens included. packs: whether all turns of an image are
    one row behind its soft prompt (`can_pack`); else each is a row of its own, with the same loss.
    """

    language_model: LanguageModel
    tokenizer: TurnTokenizer
    max_text_tokens: int
    packs: bool

    @property
    def llm(self) -> PreTrainedModel:
        return self.language_model.llm

    def loss(self, prefix: Tensor, qa_turns: Sequence[Sequence[QaTurn]]) -> Tensor:
        """Compute the mean loss of the answer tokens of each image's QA turns, prefix [B, Q, L]."""
        num_soft_tokens = prefix.shape[1]
        limit = min(self.max_text_tokens, self.language_model.max_positions - num_soft_tokens)
        rows = [
            [self.tokenizer.continue_prompt(turn, max_tokens=limit) for turn in turns] for turns in qa_turns
        ]
        return self._packed_loss(prefix, rows) if self.packs else self._row_loss(prefix, rows)

    def _packed_loss(self, prefix: Tensor, rows: Sequence[Sequence[WeightedText]]) -> Tensor:
        batch = pack_texts(rows, prefix.shape[1], self.tokenizer.end_token_id).to(prefix.device)
        return lm_loss(run_packed(self.llm, prefix, batch).logits, batch)

    def _row_loss(self, prefix: Tensor, rows: Sequence[Sequence[WeightedText]]) -> Tensor:
        image = torch.tensor([index for index, texts in enumerate(rows) for _ in texts])
        alone = [[text] for texts in rows for text in texts]
        batch = pack_texts(alone, prefix.shape[1], self.tokenizer.end_token_id).to(prefix.device)
        return lm_loss(run_alone(self.llm, prefix[image.to(prefix.device)], batch).logits, batch)


def build_decoder_only_objective(
    language_model: LanguageModel, *, max_text_tokens: int
) -> DecoderOnlyObjective:
    """Build the objective; tries whether the model computes packed texts."""
    tokenizer = TurnTokenizer(language_model)
    return DecoderOnlyObjective(
        language_model, tokenizer, max_text_tokens, packs=can_pack(language_model.llm)
    )
