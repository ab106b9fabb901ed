"""The frozen language model: the only file that knows which family it is of (OPT)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, OPTForCausalLM, PreTrainedTokenizerFast

from model.errors import InvalidPromptError

IMAGE_TOKEN = "<image>"


class DecodingState:
    """What a language model remembers of a batch of R growing sequences.

    cache: keys and values of all tokens so far. attention_mask: [R, S], 0 at the padding on the left, or
    None where no row is padded. next_positions: [R], the position of each row's next token.
    """

    def __init__(self, cache: Cache, attention_mask: Tensor | None, next_positions: Tensor) -> None:
        self.cache = cache
        self.attention_mask = attention_mask
        self.next_positions = next_positions

    def select(self, rows: Sequence[int]) -> None:
        """Makes row i a copy of the former row `rows[i]`; rows not named are forgotten."""
        if list(rows) == list(range(len(self.next_positions))):
            return
        index = torch.tensor(rows, device=self.next_positions.device)
        self.cache.reorder_cache(index)
        self.next_positions = self.next_positions[index]
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[index]


class LanguageModel(nn.Module):
    """A decoder-only language model that continues soft tokens followed by a prompt.

    llm: transformers' model. tokenizer: its tokenizer. hidden_size: L. eos_token_ids: those that end an
    answer (OPT: the newline). max_positions: how many tokens, image tokens included, it can hold.
    image_token_id: the id that stands for a soft token where a sequence is looked at as ids, as
    repetition penalties do; the tokenizer's "<image>", else padding, unless given.
    """

    def __init__(
        self, llm: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, *, image_token_id: int | None = None
    ) -> None:
        super().__init__()
        self.llm = llm
        self.tokenizer = tokenizer
        config = llm.config
        eos = config.eos_token_id
        self.eos_token_ids: tuple[int, ...] = tuple(eos) if isinstance(eos, list) else (eos,)
        self.bos_token_id: int = config.bos_token_id
        self.hidden_size: int = config.hidden_size
        self.max_positions: int = config.max_position_embeddings
        if image_token_id is None:
            image_token_id = tokenizer.get_vocab().get(IMAGE_TOKEN, config.pad_token_id)
        self.image_token_id: int = image_token_id

    @property
    def dtype(self) -> torch.dtype:
        return self.llm.get_input_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        return self.llm.get_input_embeddings().weight.device

    def tokenize(self, prompt: str) -> tuple[int, ...]:
        """Gives the ids of a prompt behind the beginning-of-text token, whatever the tokenizer adds itself.

        May be called from several threads. Raises InvalidPromptError where the model has fewer positions.
        """
        token_ids = (self.bos_token_id, *self.tokenizer.encode(prompt, add_special_tokens=False))
        if len(token_ids) > self.max_positions:
            raise InvalidPromptError(
                f"the prompt has {len(token_ids)} tokens, the limit is {self.max_positions}; shorten it"
            )
        return token_ids

    def check_length(self, *, num_prompt_tokens: int, num_soft_tokens: int, max_new_tokens: int) -> None:
        """Raises InvalidPromptError where soft tokens, prompt and answer together exceed the positions."""
        total = num_soft_tokens + num_prompt_tokens + max_new_tokens
        if total > self.max_positions:
            raise InvalidPromptError(
                f"the prompt has {num_prompt_tokens} tokens; with {num_soft_tokens} image tokens and up to "
                f"{max_new_tokens} new tokens that makes {total}, the limit is {self.max_positions}; "
                "shorten the prompt or lower max_new_tokens"
            )

    def decode_tokens(self, token_ids: Sequence[int]) -> str:
        """Gives the text of an answer, without special and end tokens and without surrounding space."""
        kept = [token_id for token_id in token_ids if token_id not in self.eos_token_ids]
        text: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        return text.strip()

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """Gives the [.., L] embeddings of [..] ids."""
        return self.llm.get_input_embeddings()(input_ids)

    def prefill(
        self, language_model_inputs: Sequence[Tensor], prompts: Sequence[Sequence[int]]
    ) -> tuple[Tensor, DecodingState]:
        """Reads J sequences, each of soft tokens [Q, L] and prompt ids, in one pass.

        Sequences of unequal length are padded on the left, where no other token looks, and keep their own
        positions, so that none depends on its neighbours. Gives the [J, N] float32 logits of the next token
        and the state from which `advance` goes on.
        """
        token_ids = torch.tensor([token_id for prompt in prompts for token_id in prompt], device=self.device)
        prompt_embeds = torch.split(self.embed_tokens(token_ids), [len(prompt) for prompt in prompts])
        prefixes = [
            torch.cat([soft_tokens.to(embeds), embeds])  # [S_j, L]
            for soft_tokens, embeds in zip(language_model_inputs, prompt_embeds, strict=True)
        ]
        lengths = torch.tensor([len(prefix) for prefix in prefixes], device=self.device)  # [J]
        size = max(map(len, prefixes))
        positions = torch.arange(size, device=self.device) - (size - lengths)[:, None]  # [J, S], < 0: padding
        is_padded = any(len(prefix) < size for prefix in prefixes)
        attention_mask = (positions >= 0).long() if is_padded else None
        output = self.llm(
            inputs_embeds=torch.stack([F.pad(prefix, (0, 0, size - len(prefix), 0)) for prefix in prefixes]),
            attention_mask=attention_mask,
            position_ids=positions.clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        state = DecodingState(output.past_key_values, attention_mask, lengths)
        return output.logits[:, -1].float(), state

    def advance(self, state: DecodingState, tokens: Sequence[int]) -> Tensor:
        """Appends one token to each of the R rows of `state`; gives the [R, N] float32 logits of the next."""
        if state.attention_mask is not None:
            state.attention_mask = F.pad(state.attention_mask, (0, 1), value=1)
        output = self.llm(
            input_ids=torch.tensor(tokens, device=self.device)[:, None],
            attention_mask=state.attention_mask,
            position_ids=state.next_positions[:, None],
            past_key_values=state.cache,
            use_cache=True,
        )
        state.next_positions = state.next_positions + 1
        return output.logits[:, -1].float()
