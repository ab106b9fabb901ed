"""Encoder-decoder language models (T5): soft tokens and prompt are encoded, the answer is decoded."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, EncoderDecoderCache, PreTrainedModel

from model.errors import InvalidParamsError, InvalidPromptError, UnfitLanguageModelError
from model.language.kv_cache import split_cache
from model.language.model_family import PrefillOutput, SpecialTokenTemplate

DEFAULT_POSITIONS = 512  # for a configuration that sets no limit
RELATIVE_POSITIONS = 1024  # of T5: its positions set no limit, but its attention computes all pairs of them


class EncoderDecoderBatch:
    """A batch of R answers, each with its encoded prefix.

    cache: keys and values of the answers' tokens and of the prefixes, which no step computes again.
    encoder_hidden_states: [R, S, L]. attention_mask: [R, S], 0 at the padding on the right; None where no
    prefix is padded. sources: [R], the prefix that each row attends to, counted as they were encoded.
    """

    def __init__(
        self,
        llm: PreTrainedModel,
        cache: EncoderDecoderCache,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None,
    ) -> None:
        self.cache = cache
        self.encoder_hidden_states = encoder_hidden_states
        self.attention_mask = attention_mask
        self.sources = list(range(len(encoder_hidden_states)))
        self._llm = llm

    def reorder(self, rows: Sequence[int]) -> None:
        if list(rows) == list(range(len(self.sources))):
            return
        index = torch.tensor(rows, device=self.encoder_hidden_states.device)
        self.cache.self_attention_cache.reorder_cache(index)
        sources = [self.sources[row] for row in rows]
        if (
            sources != self.sources
        ):  # else beams were reordered within their sequences, which share one prefix
            self.sources = sources
            self._reorder_prefixes(index)

    def decode_step(self, token_ids: Sequence[int]) -> Tensor:
        output = self._llm(
            encoder_outputs=(self.encoder_hidden_states,),
            attention_mask=self.attention_mask,
            decoder_input_ids=torch.tensor(token_ids, device=self.encoder_hidden_states.device)[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[:, -1]

    def _reorder_prefixes(self, index: Tensor) -> None:
        self.cache.cross_attention_cache.reorder_cache(index)
        self.encoder_hidden_states = self.encoder_hidden_states[index]
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[index]


class EncoderDecoder:
    """The family of T5: the prefix is encoded, and an answer begins with a start token."""

    question_template = "Question: {} Short answer:"

    def __init__(self, llm: PreTrainedModel, special_tokens: SpecialTokenTemplate) -> None:
        self._llm = llm
        self.special_tokens = special_tokens
        if llm.config.decoder_start_token_id is None:
            raise UnfitLanguageModelError(
                "names no token that an answer begins with; set 'decoder_start_token_id' in its config.json"
            )
        self._start_token_id: int = llm.config.decoder_start_token_id
        # T5's `n_positions` is the length it was trained with; distances beyond it share a bias.
        is_relative = hasattr(llm.config, "relative_attention_num_buckets")
        absolute = getattr(llm.config, "max_position_embeddings", None) or DEFAULT_POSITIONS
        trained = getattr(llm.config, "n_positions", None) or 0
        self.max_positions: int = max(RELATIVE_POSITIONS, trained) if is_relative else absolute

    def answer_context(self, _prefix_ids: Sequence[int]) -> tuple[int, ...]:
        return (self._start_token_id,)

    def check_length(self, *, num_prompt_tokens: int, num_soft_tokens: int, max_new_tokens: int) -> None:
        """Raise InvalidPromptError where soft tokens and prompt exceed the positions of the encoder.

        Raises InvalidParamsError where the answer may exceed those of the decoder.
        """
        total = num_soft_tokens + num_prompt_tokens
        if total > self.max_positions:
            raise InvalidPromptError(
                f"the prompt has {num_prompt_tokens} tokens; with {num_soft_tokens} image tokens that makes "
                f"{total}, the limit is {self.max_positions}; shorten the prompt"
            )
        if max_new_tokens > self.max_positions:
            raise InvalidParamsError(
                f"max_new_tokens is {max_new_tokens}, this language model answers with at most "
                f"{self.max_positions} tokens; lower max_new_tokens"
            )

    def prefill(self, prefixes: Sequence[Tensor]) -> PrefillOutput:
        logits, batch = self.prefill_batch(prefixes)
        start_token = [slice(1)] * len(prefixes)
        spans = [slice(len(prefix)) for prefix in prefixes]
        return PrefillOutput(
            logits,
            split_cache(batch.cache.self_attention_cache, start_token),
            split_cache(batch.cache.cross_attention_cache, spans),
        )

    def decode_step(self, input_ids: Tensor, _positions: Tensor, cache: Cache) -> Tensor:
        no_mask = torch.zeros(1, 1, 1, 1, device=input_ids.device)  # 4 dimensions: used as it is
        output = self._llm(
            encoder_outputs=(no_mask[0],),  # required, and never read
            attention_mask=no_mask,
            decoder_input_ids=input_ids,
            decoder_attention_mask=no_mask,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits[:, -1]

    def prefill_batch(self, prefixes: Sequence[Tensor]) -> tuple[Tensor, EncoderDecoderBatch]:
        """Encode prefixes padded on the right; the positions of T5 are relative."""
        size = max(map(len, prefixes))
        device = prefixes[0].device
        lengths = torch.tensor([len(prefix) for prefix in prefixes], device=device)  # [J]
        is_padded = any(len(prefix) < size for prefix in prefixes)
        attention_mask = (torch.arange(size, device=device) < lengths[:, None]).long() if is_padded else None
        output = self._llm(
            inputs_embeds=torch.stack([F.pad(prefix, (0, 0, 0, size - len(prefix))) for prefix in prefixes]),
            attention_mask=attention_mask,  # [J, S]
            decoder_input_ids=torch.full((len(prefixes), 1), self._start_token_id, device=device),
            use_cache=True,
        )
        batch = EncoderDecoderBatch(
            self._llm, output.past_key_values, output.encoder_last_hidden_state, attention_mask
        )
        return output.logits[:, -1], batch
