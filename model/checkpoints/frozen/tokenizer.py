"""Tokenizers of language models and of the Q-Former's texts."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from model.errors import CheckpointError
from model.text_encoder import TextEncoder

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a directory; never from the network. Raises CheckpointError."""
    if not any((directory / name).is_file() for name in _VOCABULARIES):
        raise CheckpointError(  # transformers would build one with an empty vocabulary, without an error
            f"{directory} holds no tokenizer ({', '.join(_VOCABULARIES)}); put that of this checkpoint there"
        )
    try:
        if (directory / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library in Rust raises no other type
        raise CheckpointError(
            f"{directory} holds no tokenizer that can be read ({error}); put tokenizer.json and "
            "tokenizer_config.json there"
        ) from error


def load_text_tokenizer(directory: Path, num_embeddings: int) -> PreTrainedTokenizerFast:
    """Load the tokenizer of the texts of a Q-Former with a number of word embeddings.

    Raises CheckpointError where it lacks one of the special tokens around a text, or the padding, and where
    a text may become a token without an embedding. "<image>", which texts never become, needs none.
    """
    tokenizer = load_tokenizer(directory)
    for name in ("cls_token", "sep_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise CheckpointError(
                f"the tokenizer of {directory} has no {name!r}; put that of BERT there, "
                "with [DEC] as its bos token"
            )
        if (token_id := getattr(tokenizer, f"{name}_id")) >= num_embeddings:
            raise _unembedded(directory, getattr(tokenizer, name), token_id, num_embeddings)
    if (unembedded := TextEncoder(tokenizer).find_unembedded(num_embeddings)) is not None:
        raise _unembedded(directory, *unembedded, num_embeddings)
    return tokenizer


def _unembedded(directory: Path, token: str, token_id: int, num_embeddings: int) -> CheckpointError:
    return CheckpointError(
        f"the Q-Former has {num_embeddings} word embeddings, and the tokenizer of {directory} the token "
        f"{token!r} with the id {token_id}; put the tokenizer there that it was trained with"
    )
