"""Tokenizers of language models and of the Q-Former's texts."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from model.errors import CheckpointError

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


def load_text_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a Q-Former's texts.

    Raises CheckpointError where it lacks one of the special tokens around a text, or the padding.
    """
    tokenizer = load_tokenizer(directory)
    for name in ("cls_token", "sep_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise CheckpointError(
                f"the tokenizer of {directory} has no {name!r}; put that of BERT there, "
                "with [DEC] as its bos token"
            )
    return tokenizer
