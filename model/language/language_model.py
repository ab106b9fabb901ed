"""A frozen language model of either family: tokens in, tokens out."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from model.errors import InvalidPromptError, UnfitLanguageModelError
from model.language.decoder_only import DecoderOnly
from model.language.encoder_decoder import EncoderDecoder
from model.language.model_family import DecodingState, Extent, Family, Frame
from model.language.per_beam_state import PlainState
from model.language.shared_prefix_state import SharedPrefixState, why_not

logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"


class LanguageModel(nn.Module):
    """A language model that answers to soft tokens followed by a prompt.

    llm: transformers' model, decoder-only (OPT, Llama, Qwen2) or encoder-decoder (T5). tokenizer: its own.
    hidden_size: L. eos_token_ids: those that end an answer (OPT of BLIP-2: the newline; T5: `</s>`).
    question_template: the prompt of a question that its family answers best to, with one `{}`.
    max_positions: how many tokens, image tokens included, one sequence can hold.
    image_token_id: the id that stands for a soft token where a sequence is looked at as ids, as
    repetition penalties do; the tokenizer's "<image>", else padding, else an end token, unless given.
    Raises UnfitLanguageModelError for one that says not what its answers begin or end with.
    """

    def __init__(
        self,
        llm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        image_token_id: int | None = None,
    ) -> None:
        super().__init__()
        self.llm = llm
        self.tokenizer = tokenizer
        config = llm.config
        _check_fit(llm)
        self.eos_token_ids = _find_eos_token_ids(llm)
        self.hidden_size: int = config.hidden_size
        if image_token_id is None:
            image_token_id = tokenizer.get_vocab().get(IMAGE_TOKEN, config.pad_token_id)
        self.image_token_id: int = self.eos_token_ids[0] if image_token_id is None else image_token_id
        frame = _find_frame(llm, tokenizer)
        self._family: Family = (
            EncoderDecoder(llm, frame) if config.is_encoder_decoder else DecoderOnly(llm, frame)
        )
        self.question_template = self._family.question_template
        self.max_positions = self._family.max_positions

    @property
    def dtype(self) -> torch.dtype:
        return self.llm.get_input_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        return self.llm.get_input_embeddings().weight.device

    def tokenize(self, prompt: str) -> tuple[int, ...]:
        """Gives the ids of a prompt with the special tokens that belong to it.

        OPT: behind the beginning-of-text token. T5: before the end-of-text token, whatever their tokenizers
        add; any other: as its own does. May be called from several threads. Raises InvalidPromptError where
        the model has fewer positions.
        """
        first, last = self._family.frame
        token_ids = (*first, *self.tokenizer.encode(prompt, add_special_tokens=False), *last)
        if len(token_ids) > self.max_positions:
            raise InvalidPromptError(
                f"the prompt has {len(token_ids)} tokens, the limit is {self.max_positions}; shorten it"
            )
        return token_ids

    def check_length(self, *, num_prompt_tokens: int, num_soft_tokens: int, max_new_tokens: int) -> None:
        """Raises InvalidPromptError where soft tokens, prompt and answer exceed the positions.

        OPT: together. T5: soft tokens and prompt those of the encoder; where the answer exceeds those of the
        decoder, InvalidParamsError.
        """
        self._family.check_length(
            num_prompt_tokens=num_prompt_tokens,
            num_soft_tokens=num_soft_tokens,
            max_new_tokens=max_new_tokens,
        )

    def answer_context(self, num_soft_tokens: int, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """Gives the ids in front of an answer, as transformers' BLIP-2 has its penalties see them.

        OPT: image tokens and prompt. T5: the one token an answer begins with.
        """
        return self._family.answer_context([self.image_token_id] * num_soft_tokens + list(prompt_ids))

    def decode_tokens(self, token_ids: Sequence[int]) -> str:
        """Gives the text of an answer, without special and end tokens and without surrounding space."""
        kept = [token_id for token_id in token_ids if token_id not in self.eos_token_ids]
        text: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        return text.strip()

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Gives the text of each token by itself, special tokens by their names."""
        texts: list[str] = self.tokenizer.batch_decode([[token_id] for token_id in token_ids])
        return texts

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """Gives the [.., L] embeddings of [..] ids."""
        return self.llm.get_input_embeddings()(input_ids)

    def build_state(self) -> DecodingState:
        """Gives what remembers growing sequences, empty; for one thread.

        Where the model does not fit the sharing of keys and values, the log says why.
        """
        reason = why_not(self.llm)
        if reason is None:
            return SharedPrefixState(self.llm, self._family)
        logger.warning("%s shares no keys and values between beams: %s", type(self.llm).__name__, reason)
        return PlainState(self.llm, self._family)

    def prefill(
        self,
        language_model_inputs: Sequence[Tensor],
        prompts: Sequence[Sequence[int]],
        widths: Sequence[int] | None = None,
    ) -> tuple[Tensor, DecodingState]:
        """Reads J sequences, each of soft tokens [Q, L] and prompt ids, in one pass.

        They may be of unequal length; none depends on its neighbours. widths: the rows that each will grow,
        one unless given. Gives the [J, N] float32 logits of the next token and the state that goes on from
        there.
        """
        state = self.build_state()
        prefixes = [self.embed_prefix(*each) for each in zip(language_model_inputs, prompts, strict=True)]
        extents = [
            Extent(len(prefix), num_rows, self.max_positions)
            for prefix, num_rows in zip(prefixes, widths or [1] * len(prefixes), strict=True)
        ]
        return state.admit(prefixes, extents).float(), state

    def embed_prefix(self, soft_tokens: Tensor, prompt_ids: Sequence[int]) -> Tensor:
        """Gives the [Q + T, L] embeddings of [Q, L] soft tokens and a prompt behind them."""
        token_ids = torch.tensor(prompt_ids, dtype=torch.long, device=self.device)
        embeds = self.embed_tokens(token_ids)
        return torch.cat([soft_tokens.to(embeds), embeds])


def _check_fit(llm: PreTrainedModel) -> None:
    hidden_size = getattr(llm.config, "hidden_size", None)
    width = llm.get_input_embeddings().weight.shape[1]
    if hidden_size != width:
        raise UnfitLanguageModelError(
            f"has embeddings {width} wide and hidden states {hidden_size} wide; soft tokens must be both"
        )
    if not llm.config.is_encoder_decoder and getattr(llm.config, "is_decoder", True) is False:
        raise UnfitLanguageModelError("is an encoder ('is_decoder' is false), which generates no text")


def _find_eos_token_ids(llm: PreTrainedModel) -> tuple[int, ...]:
    eos = llm.generation_config.eos_token_id if llm.generation_config is not None else None
    eos = llm.config.eos_token_id if eos is None else eos
    tokens = eos if isinstance(eos, list) else [eos]
    if not tokens or not all(isinstance(token, int) for token in tokens):
        raise UnfitLanguageModelError(
            f"says that an answer ends with {eos!r}; set 'eos_token_id' in its config.json to an id"
        )
    return tuple(tokens)


def _find_frame(llm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Frame:
    """Gives the special tokens around a prompt."""
    config = llm.config
    if config.model_type == "opt":  # whose older tokenizers leave it out
        return (config.bos_token_id,), ()
    if config.model_type == "t5":
        return (), (config.eos_token_id,)
    bare, whole = (tokenizer.encode("a", add_special_tokens=framed) for framed in (False, True))
    start = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), None)
    if start is None or not bare:
        raise UnfitLanguageModelError(
            f"has a tokenizer that turns 'a' into {bare}, and into {whole} with special tokens; "
            "it does not tell which of them stand around a prompt"
        )
    return tuple(whole[:start]), tuple(whole[start + len(bare) :])
