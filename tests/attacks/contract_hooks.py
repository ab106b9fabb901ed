"""Hooks of schemathesis: real images, and the rules across fields that JSON Schema cannot express.

JSON Schema compares no two numbers. So two rules are in the descriptions of their fields, and here:
min_new_tokens is at most max_new_tokens, and top_k at most rerank_k where candidates are re-ranked.
"""

import struct
from typing import Any

import schemathesis
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode

from tests.integration.pictures import in_base64, picture


def bitmap(level: int) -> str:
    """Return a BMP of 8 x 8 grey pixels whose bytes are all ASCII.

    schemathesis cannot validate bodies that hold bytes, so it would take some valid ones for invalid.
    """
    pixels = bytes([level]) * (8 * 8 * 3)
    header = struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 8, 8, 1, 24, 0, 0, 0, 0, 0, 0)
    return (b"BM" + header + pixels).decode("ascii")


_MAX_NEW_TOKENS = {"/caption": 30, "/vqa": 10, "/retrieve": 0}  # the defaults
_RERANK_K = 128

schemathesis.openapi.format(
    "image", st.sampled_from([in_base64(picture(seed, size=(8, 6))) for seed in range(8)])
)
schemathesis.openapi.format("binary", st.sampled_from([bitmap(level) for level in range(0, 128, 16)]))


@schemathesis.hook
def filter_case(context: schemathesis.HookContext, case: schemathesis.Case[Any]) -> bool:
    """Drop cases that are not what they are meant to be.

    Valid ones that break one of the two rules; invalid forms whose question is of another type, since a form
    has texts only, or with a field that a form says in the same way as a valid one; and several images that
    are none, for each of them fails alone in an answer of 200.
    """
    if not isinstance(case.body, dict):
        return True
    if case.meta is None or case.meta.generation.mode is GenerationMode.POSITIVE:
        return _is_valid(case.path, case.body)
    if case.media_type == "multipart/form-data":
        return _is_text(case.body.get("question", "")) and all(map(_is_own, case.body.values()))
    return not _is_text(case.body.get("images", 0))


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(each, str) for each in value)
    )


def _is_own(value: object) -> bool:
    """Return whether a form shows the type: an empty value is as absent, and a list of one as its item."""
    return value != "" and not (isinstance(value, list) and (len(value) < 2 or "" in value))


def _is_valid(path: str, body: dict[str, Any]) -> bool:
    given = {name: value for name, value in body.items() if value is not None}
    if path != "/retrieve":
        max_new_tokens = given.get("max_new_tokens", _MAX_NEW_TOKENS[path])
        return bool(given.get("min_new_tokens", 1) <= max_new_tokens)
    return bool(given.get("mode") == "itc" or given.get("top_k", 1) <= given.get("rerank_k", _RERANK_K))
