"""Warnings about texts whose ends a checkpoint does not read."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from service.model_backend import Backend

_MAX_INLINE_CHARS: Final = 2**13  # of all texts, which take a millisecond; more are tokenized in a thread
_MAX_NAMED: Final = 10


async def warn_of_cut_texts(backend: Backend, texts: Mapping[str, str]) -> list[str]:
    """Return a warning for each text that is cut for the matching head, by its field; for ten at most."""
    reason = f"has more than the {backend.max_text_tokens} tokens that {backend.matching_name!r} reads"
    return await _warn(texts, backend.is_text_cut, f"{reason}; its end was ignored")


async def warn_of_cut_questions(backend: Backend, questions: Mapping[str, str]) -> list[str]:
    """Return a warning for each question that is cut for a Q-Former which reads questions; for ten."""
    reason = f"has more tokens than the Q-Former of {backend.name!r} reads; there its end was ignored"
    return await _warn(questions, backend.is_question_cut, reason)


async def _warn(texts: Mapping[str, str], is_cut: Callable[[str], bool], reason: str) -> list[str]:
    def find_cut() -> list[str]:
        return [field for field, text in texts.items() if is_cut(text)]

    is_long = sum(map(len, texts.values())) > _MAX_INLINE_CHARS
    fields = await asyncio.to_thread(find_cut) if is_long else find_cut()
    warnings = [f"{field}: {reason}" for field in fields[:_MAX_NAMED]]
    if len(fields) > _MAX_NAMED:
        warnings.append(f"{len(fields) - _MAX_NAMED} more texts are too long as well")
    return warnings
