"""Prompts and answers as token ids."""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from model.errors import InvalidPromptError, UnfitLanguageModelError
from model.language.model_family import SpecialTokenTemplate
from model.text_encoder import TextEncoder


class PromptTokenizer:
    """Tokenizes prompts with their special tokens. May be called from several threads.

    tokenizer: the language model's own. special_tokens: the template around a prompt, whatever the tokenizer
    adds by itself. A prompt itself becomes no special token, see `TextEncoder`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokenTemplate) -> None:
        self._tokenizer = tokenizer
        self._encoder = TextEncoder(tokenizer)
        self._special_tokens = special_tokens

    def tokenize(self, prompt: str, *, max_tokens: int) -> tuple[int, ...]:
        """Return the ids of a prompt. Raises InvalidPromptError where they exceed `max_tokens`."""
        prefix_ids, suffix_ids = self._special_tokens
        token_ids = (*prefix_ids, *self._encoder.encode(prompt), *suffix_ids)
        if len(token_ids) > max_tokens:
            raise InvalidPromptError(
                f"the prompt has {len(token_ids)} tokens, the limit is {max_tokens}; shorten it"
            )
        return token_ids

    def check_embeddings(self, num_embeddings: int, eos_token_ids: Sequence[int]) -> None:
        """Raise UnfitLanguageModelError where a prompt or an end token may be past the embeddings."""
        if (unembedded := self._encoder.find_unembedded(num_embeddings)) is not None:
            token, token_id = unembedded
            raise UnfitLanguageModelError(
                f"has {num_embeddings} word embeddings, and its tokenizer the token {token!r} with the id "
                f"{token_id}; use the tokenizer it was trained with, or add embeddings with transformers' "
                "resize_token_embeddings"
            )
        special_ids = *self._special_tokens.prefix_ids, *self._special_tokens.suffix_ids, *eos_token_ids
        if outside := [each for each in special_ids if not 0 <= each < num_embeddings]:
            raise UnfitLanguageModelError(
                f"has {num_embeddings} word embeddings, and its configuration the special token "
                f"{outside[0]}; correct 'bos_token_id' and 'eos_token_id' there"
            )

    def decode_tokens(self, token_ids: Sequence[int], *, eos_token_ids: Sequence[int]) -> str:
        """Return the text of an answer, without special and end tokens and without surrounding space."""
        kept = [token_id for token_id in token_ids if token_id not in eos_token_ids]
        text: str = self._tokenizer.decode(kept, skip_special_tokens=True)
        return text.strip()

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token by itself; special tokens by their names."""
        texts: list[str] = self._tokenizer.batch_decode([[token_id] for token_id in token_ids])
        return texts


def find_special_tokens(llm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> SpecialTokenTemplate:
    """Return the special tokens that a language model was trained with around a text.

    OPT: the begin token in front, which older tokenizers of it leave out. T5: the end token behind. Any
    other: as its tokenizer adds them. Raises UnfitLanguageModelError where they cannot be separated from
    the text.
    """
    config = llm.config
    if config.model_type == "opt":
        return SpecialTokenTemplate((config.bos_token_id,), ())
    if config.model_type == "t5":
        return SpecialTokenTemplate((), (config.eos_token_id,))
    bare, whole = (tokenizer.encode("a", add_special_tokens=added) for added in (False, True))
    offsets = (at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    start = next(offsets, None)
    if start is None or not bare:
        raise UnfitLanguageModelError(
            f"has a tokenizer that turns 'a' into {bare}, and into {whole} with special tokens; "
            "which of them surround a prompt is unknown"
        )
    return SpecialTokenTemplate(tuple(whole[:start]), tuple(whole[start + len(bare) :]))


def find_eos_token_ids(llm: PreTrainedModel) -> tuple[int, ...]:
    """Return the tokens that end an answer. Raises UnfitLanguageModelError where none is configured."""
    eos = llm.generation_config.eos_token_id if llm.generation_config is not None else None
    eos = llm.config.eos_token_id if eos is None else eos
    token_ids = eos if isinstance(eos, list) else [eos]
    if not token_ids or not all(type(token_id) is int for token_id in token_ids):
        raise UnfitLanguageModelError(
            f"says that an answer ends with {eos!r}; set 'eos_token_id' in its config.json to an id"
        )
    return tuple(token_ids)
