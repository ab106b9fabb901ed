"""The Q-Former and its text embeddings."""

from model.qformer.layer import KeysValues, QFormerLayer
from model.qformer.qformer import (
    ImageKeysValues,
    QFormer,
    QueryStates,
    build_query_tokens,
    copy_text_ffn_to_query_ffn,
    init_weights,
    select_images,
)

__all__ = [
    "ImageKeysValues",
    "KeysValues",
    "QFormer",
    "QFormerLayer",
    "QueryStates",
    "build_query_tokens",
    "copy_text_ffn_to_query_ffn",
    "init_weights",
    "select_images",
]
