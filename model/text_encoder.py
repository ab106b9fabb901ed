"""Texts as token ids, none of which is a special token."""

import copy
from collections.abc import Collection, Iterator

from transformers import PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"


class TextEncoder:
    """Encodes texts without special tokens. May be called from several threads.

    What a text writes like a special token, for instance "</s>" or "<image>", is encoded as its characters.
    tokenizer: its backend is copied, so that no other caller changes how texts are encoded.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        special_ids = set(self._special_ids())
        # T5's vocabulary itself has the special tokens, so they are found in a text all the same.
        self._characters = {each: self._encode_characters(each, special_ids) for each in special_ids}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens around it."""
        token_ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if self._characters.keys().isdisjoint(token_ids):
            return token_ids
        return [each for token_id in token_ids for each in self._characters.get(token_id, (token_id,))]

    def find_unembedded(self, num_embeddings: int) -> tuple[str, int] | None:
        """Return a token that a text may become and its id, if that is past the rows of word embeddings."""
        vocabulary: dict[str, int] = self._backend.get_vocab()
        reachable = ((token, each) for token, each in vocabulary.items() if each not in self._characters)
        token, token_id = max(reachable, key=lambda item: item[1], default=("", -1))
        return (token, token_id) if token_id >= num_embeddings else None

    def _special_ids(self) -> Iterator[int]:
        """Iterate over the special tokens but for the unknown one, which is what any text may become."""
        unknown = self.tokenizer.unk_token_id
        yield from (each for each in self.tokenizer.all_special_ids if each != unknown)
        for token_id, token in self.tokenizer.added_tokens_decoder.items():
            if token_id != unknown and (token.special or token.content == IMAGE_TOKEN):
                yield token_id

    def _encode_characters(self, token_id: int, special_ids: Collection[int]) -> tuple[int, ...]:
        """Return the ids of a token's characters; the unknown one, if any, where the vocabulary has none."""
        unknown = self.tokenizer.unk_token_id
        token_ids = [self._backend.token_to_id(each) for each in self._backend.id_to_token(token_id)]
        known = (unknown if each is None or each in special_ids else each for each in token_ids)
        return tuple(each for each in known if each is not None)
