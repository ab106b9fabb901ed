"""A frozen language model of either family: tokens in, tokens out."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from model.errors import UnfitLanguageModelError
from model.language.decoder_only import DecoderOnly
from model.language.decoding_state import DecodingState, MemoryRequirement
from model.language.encoder_decoder import EncoderDecoder
from model.language.model_family import ModelFamily
from model.language.per_beam_state import PerBeamState, per_beam_kv_bytes
from model.language.prompt_tokenizer import (
    PromptTokenizer,
    find_eos_token_ids,
    find_special_tokens,
)
from model.language.shared_prefix_state import (
    SharedPrefixState,
    shared_prefix_kv_bytes,
    unsupported_reason,
)
from model.text_encoder import IMAGE_TOKEN

logger = logging.getLogger(__name__)


class LanguageModel(nn.Module):
    """A language model that continues soft tokens followed by a prompt.

    llm: transformers' model, decoder-only (OPT, Llama, Qwen2) or encoder-decoder (T5). tokenizer: its own.
    hidden_size: L. eos_token_ids: those that end an answer (OPT of BLIP-2: the newline; T5: `</s>`).
    model_family: prefill and decode steps of its kind. question_template: the prompt in which it answers
    questions best, with one `{}`. max_positions: the most tokens of one sequence, image tokens included.
    image_token_id: the id that stands for a soft token where ids are needed, for instance by repetition
    penalties: the one given, else the tokenizer's "<image>", padding or an end token; the first that has an
    embedding.
    Raises UnfitLanguageModelError where the start or the end of its answers is not configured, and where
    its tokenizer has tokens without an embedding.
    """

    def __init__(
        self,
        llm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        image_token_id: int | None = None,
    ) -> None:
        super().__init__()
        _check_fit(llm)
        self.llm = llm
        self.tokenizer = tokenizer
        self.hidden_size: int = llm.config.hidden_size
        self.eos_token_ids = find_eos_token_ids(llm)
        special_tokens = find_special_tokens(llm, tokenizer)
        self._prompt_tokenizer = PromptTokenizer(tokenizer, special_tokens)
        self._prompt_tokenizer.check_embeddings(self.num_embeddings, self.eos_token_ids)
        stand_ins = (image_token_id, tokenizer.get_vocab().get(IMAGE_TOKEN), llm.config.pad_token_id)
        embedded = (each for each in stand_ins if each is not None and 0 <= each < self.num_embeddings)
        self.image_token_id: int = next(embedded, self.eos_token_ids[0])
        build_family = EncoderDecoder if llm.config.is_encoder_decoder else DecoderOnly
        self.model_family: ModelFamily = build_family(llm, special_tokens)
        self.question_template = self.model_family.question_template
        self.max_positions = self.model_family.max_positions
        self._unsupported_reason = unsupported_reason(llm)

    @property
    def num_embeddings(self) -> int:
        """The number of word embeddings; ids of tokens are below it."""
        return len(self.llm.get_input_embeddings().weight)

    @property
    def dtype(self) -> torch.dtype:
        return self.llm.get_input_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        return self.llm.get_input_embeddings().weight.device

    def tokenize(self, prompt: str) -> tuple[int, ...]:
        """Return the ids of a prompt with its special tokens; thread-safe.

        OPT: behind the beginning-of-text token. T5: before the end-of-text token, whatever their tokenizers
        add; any other: as its own does. Raises InvalidPromptError where they exceed the positions.
        """
        return self._prompt_tokenizer.tokenize(prompt, max_tokens=self.max_positions)

    def decode_tokens(self, token_ids: Sequence[int]) -> str:
        """Return the text of an answer, without special and end tokens and without surrounding space."""
        return self._prompt_tokenizer.decode_tokens(token_ids, eos_token_ids=self.eos_token_ids)

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token by itself; special tokens by their names."""
        return self._prompt_tokenizer.token_texts(token_ids)

    def check_length(self, *, num_prompt_tokens: int, num_soft_tokens: int, max_new_tokens: int) -> None:
        """Raise InvalidPromptError where soft tokens, prompt and answer exceed the positions.

        OPT: together. T5: soft tokens and prompt those of the encoder; where the answer exceeds those of the
        decoder, InvalidParamsError.
        """
        self.model_family.check_length(
            num_prompt_tokens=num_prompt_tokens,
            num_soft_tokens=num_soft_tokens,
            max_new_tokens=max_new_tokens,
        )

    def answer_context(self, num_soft_tokens: int, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """Return the ids in front of an answer, as the penalties of transformers' BLIP-2 count them.

        OPT: image tokens and prompt. T5: the one token an answer begins with.
        """
        return self.model_family.answer_context([self.image_token_id] * num_soft_tokens + list(prompt_ids))

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """Return the [.., L] embeddings of [..] ids."""
        return self.llm.get_input_embeddings()(input_ids)

    def embed_prefix(self, soft_tokens: Tensor, prompt_ids: Sequence[int]) -> Tensor:
        """Return the [Q + T, L] embeddings of [Q, L] soft tokens and a prompt behind them."""
        token_ids = torch.tensor(prompt_ids, dtype=torch.long, device=self.device)
        embeds = self.embed_tokens(token_ids)
        return torch.cat([soft_tokens.to(embeds), embeds])

    def build_state(self) -> DecodingState:
        """Build an empty decoding state, for one thread.

        Logs a warning where the model cannot share keys and values between beams.
        """
        if self._unsupported_reason is None:
            return SharedPrefixState(self.llm, self.model_family)
        logger.warning(
            "%s shares no keys and values between beams: %s",
            type(self.llm).__name__,
            self._unsupported_reason,
        )
        return PerBeamState(self.model_family)

    def kv_bytes(self, requirements: Sequence[MemoryRequirement]) -> int:
        """Return the most bytes of keys and values that such sequences take together; thread-safe."""
        if not requirements:
            return 0
        count = shared_prefix_kv_bytes if self._unsupported_reason is None else per_beam_kv_bytes
        return count(self.llm, requirements)

    def prefill(
        self,
        language_model_inputs: Sequence[Tensor],
        prompts: Sequence[Sequence[int]],
        beam_widths: Sequence[int] | None = None,
    ) -> tuple[Tensor, DecodingState]:
        """Compute J sequences, each of soft tokens [Q, L] and prompt ids, in one pass.

        They may be of unequal length; none depends on the others. beam_widths: the rows of each, one unless
        given. Returns the [J, N] float32 logits of the next token and the state for decode steps.
        """
        state = self.build_state()
        prefixes = [self.embed_prefix(*each) for each in zip(language_model_inputs, prompts, strict=True)]
        requirements = [
            MemoryRequirement(len(prefix), num_rows, self.max_positions)
            for prefix, num_rows in zip(prefixes, beam_widths or [1] * len(prefixes), strict=True)
        ]
        return state.prefill(prefixes, requirements).float(), state


def _check_fit(llm: PreTrainedModel) -> None:
    hidden_size = getattr(llm.config, "hidden_size", None)
    width = llm.get_input_embeddings().weight.shape[1]
    if hidden_size != width:
        raise UnfitLanguageModelError(
            f"has embeddings {width} wide and hidden states {hidden_size} wide; soft tokens must be both"
        )
    # GPT-NeoX leaves 'is_decoder' false; its attention is causal all the same.
    is_decoder = getattr(llm.config, "is_decoder", True) or any(
        getattr(module, "is_causal", False) for module in llm.modules()
    )
    if not llm.config.is_encoder_decoder and not is_decoder:
        raise UnfitLanguageModelError(
            f"is of type {llm.config.model_type!r} with 'is_decoder' false in its config.json, so it may "
            "be an encoder, which generates no text; set it to true if it was trained to generate"
        )
    if any(_has_offset_positions(name, module) for name, module in llm.named_modules()):
        raise UnfitLanguageModelError(
            f"is of type {llm.config.model_type!r}, whose positions do not begin at 0; use a model of "
            "another type"
        )


def _has_offset_positions(name: str, module: nn.Module) -> bool:
    """Return whether a module embeds positions that begin behind the padding's, as in RoBERTa."""
    is_table = isinstance(module, nn.Embedding) and "position" in name
    return is_table and module.padding_idx is not None
