"""Captions and questions as the published models were trained on (BLIP-2's code; see `clean_caption`)."""

import re
from typing import Final

MAX_WORDS: Final = 50
_MARKS: Final = r'[.!"()*#:;~]'


def clean_caption(text: str) -> str:
    """Return a caption in lower case, with a space for each of . ! " ( ) * # : ; ~, of at most 50 words."""
    text = re.sub(r"\s{2,}", " ", re.sub(_MARKS, " ", text.lower()))
    return " ".join(text.strip().split(" ")[:MAX_WORDS])


def clean_question(text: str) -> str:
    """Return a question in lower case, without . ! " ( ) * # : ; ~, of at most 50 words; "?" is kept."""
    return " ".join(re.sub(_MARKS, "", text.lower()).rstrip(" ").split(" ")[:MAX_WORDS])
