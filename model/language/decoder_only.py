"""Decoder-only language models (OPT, Llama): soft tokens, prompt and answer are one sequence."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel

from model.errors import InvalidPromptError
from model.language.kv_cache import split_cache
from model.language.model_family import PrefillOutput, SpecialTokenTemplate

DEFAULT_POSITIONS = 2048  # for a configuration that sets no limit


class DecoderOnlyBatch:
    """A batch of R sequences, padded on the left.

    cache: keys and values of all tokens so far. attention_mask: [R, S], 0 at padding; None where no row is
    padded. next_positions: [R], of each row's next token.
    """

    def __init__(
        self, llm: PreTrainedModel, cache: Cache, attention_mask: Tensor | None, next_positions: Tensor
    ) -> None:
        self.cache = cache
        self.attention_mask = attention_mask
        self.next_positions = next_positions
        self._llm = llm

    def reorder(self, rows: Sequence[int]) -> None:
        if list(rows) == list(range(len(self.next_positions))):
            return
        index = torch.tensor(rows, device=self.next_positions.device)
        self.cache.reorder_cache(index)
        self.next_positions = self.next_positions[index]
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[index]

    def decode_step(self, token_ids: Sequence[int]) -> Tensor:
        if self.attention_mask is not None:
            self.attention_mask = F.pad(self.attention_mask, (0, 1), value=1)
        output = self._llm(
            input_ids=torch.tensor(token_ids, device=self.next_positions.device)[:, None],
            attention_mask=self.attention_mask,
            position_ids=self.next_positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.next_positions = self.next_positions + 1
        return output.logits[:, -1]


class DecoderOnly:
    """The family of OPT and Llama: soft tokens, prompt and answer are one sequence."""

    question_template = "Question: {} Answer:"

    def __init__(self, llm: PreTrainedModel, special_tokens: SpecialTokenTemplate) -> None:
        self._llm = llm
        self.special_tokens = special_tokens
        self.max_positions: int = getattr(llm.config, "max_position_embeddings", None) or DEFAULT_POSITIONS

    def answer_context(self, prefix_ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(prefix_ids)

    def check_length(self, *, num_prompt_tokens: int, num_soft_tokens: int, max_new_tokens: int) -> None:
        """Raise InvalidPromptError where soft tokens, prompt and answer together exceed the positions."""
        total = num_soft_tokens + num_prompt_tokens + max_new_tokens
        if total > self.max_positions:
            raise InvalidPromptError(
                f"the prompt has {num_prompt_tokens} tokens; with {num_soft_tokens} image tokens and up to "
                f"{max_new_tokens} new tokens that makes {total}, the limit is {self.max_positions}; "
                "shorten the prompt or lower max_new_tokens"
            )

    def prefill(self, prefixes: Sequence[Tensor]) -> PrefillOutput:
        logits, batch = self.prefill_batch(prefixes)
        size = max(map(len, prefixes))
        spans = [slice(size - len(prefix), size) for prefix in prefixes]
        return PrefillOutput(logits, split_cache(batch.cache, spans))

    def decode_step(self, input_ids: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        output = self._llm(
            input_ids=input_ids,
            attention_mask=torch.zeros(1, 1, 1, 1, device=input_ids.device),  # 4 dimensions: used as it is
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits[:, -1]

    def prefill_batch(self, prefixes: Sequence[Tensor]) -> tuple[Tensor, DecoderOnlyBatch]:
        """Compute prefixes padded on the left; every sequence keeps its own positions."""
        device = prefixes[0].device
        lengths = torch.tensor([len(prefix) for prefix in prefixes], device=device)  # [J]
        size = max(map(len, prefixes))
        positions = torch.arange(size, device=device) - (size - lengths)[:, None]  # [J, S], < 0: padding
        is_padded = any(len(prefix) < size for prefix in prefixes)
        attention_mask = (positions >= 0).long() if is_padded else None
        output = self._llm(
            inputs_embeds=torch.stack([F.pad(prefix, (0, 0, size - len(prefix), 0)) for prefix in prefixes]),
            attention_mask=attention_mask,
            position_ids=positions.clamp(min=0),
            use_cache=True,
            # An index, not a slice, which is slow in a batch. On the CPU: the last layer may be elsewhere.
            logits_to_keep=torch.tensor([size - 1]),
        )
        batch = DecoderOnlyBatch(self._llm, output.past_key_values, attention_mask, lengths)
        return output.logits[:, -1], batch
