"""Hooks of schemathesis: real images, and the rules across fields that JSON Schema cannot express.

JSON Schema compares no two numbers. So two rules are in the descriptions of their fields, and here:
min_new_tokens is at most max_new_tokens, and top_k at most rerank_k where candidates are re-ranked.
"""

from typing import Any

import schemathesis
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode

from tests.integration.pictures import in_base64, picture

_PICTURES = [picture(seed) for seed in range(8)]
_MAX_NEW_TOKENS = {"/caption": 30, "/vqa": 10, "/retrieve": 0}  # the defaults
_RERANK_K = 128

schemathesis.openapi.format("image", st.sampled_from([in_base64(data) for data in _PICTURES]))
schemathesis.openapi.format("binary", st.sampled_from(_PICTURES))


@schemathesis.hook
def filter_case(context: schemathesis.HookContext, case: schemathesis.Case[Any]) -> bool:
    """Drop cases that are meant to be valid, but break one of the two rules."""
    is_positive = case.meta is None or case.meta.generation.mode is GenerationMode.POSITIVE
    return not (is_positive and isinstance(case.body, dict)) or _is_valid(case.path, case.body)


def _is_valid(path: str, body: dict[str, Any]) -> bool:
    if path != "/retrieve":
        max_new_tokens = body.get("max_new_tokens", _MAX_NEW_TOKENS[path])
        return bool(body.get("min_new_tokens", 1) <= max_new_tokens)
    return bool(body.get("mode") == "itc" or body.get("top_k", 1) <= body.get("rerank_k", _RERANK_K))
