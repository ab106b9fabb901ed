"""The Q-Former: learned queries that read an image and meet a text in shared self-attention.

One trunk, four ways through it (paper, section 3.1 and figure 2). They differ in who sees whom:

    encode_queries   queries see queries and the image               image side of the contrastive loss
    encode_texts     texts see texts, in both directions             text side of the contrastive loss
    encode_pairs     everyone sees everyone, queries see the image   image-text matching
    decode_texts     texts see queries and the texts before them     image-grounded text generation

Tensor names are those of the published checkpoints, so weights load without a key table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import QFormerConfig
from model.qformer.layer import KeysValues, QFormerLayer


@dataclass(frozen=True, slots=True)
class QueryStates:
    """What one pass of the queries over an image leaves behind.

    query_output: [B, Q, D]. keys_values: the self-attention keys and values of the queries in each
    layer, [B, H, Q, K] each, over which `QFormer.decode_texts` generates.
    """

    query_output: Tensor
    keys_values: tuple[KeysValues, ...]


class QFormerEncoder(nn.Module):
    """The stack of layers; its name is part of the tensor names."""

    def __init__(self, config: QFormerConfig, *, has_text_branch: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            QFormerLayer(
                config,
                has_cross_attention=index % config.cross_attention_frequency == 0,
                has_text_branch=has_text_branch,
            )
            for index in range(config.num_hidden_layers)
        )


class QFormer(nn.Module):
    """A BERT trunk shared by Q learned queries and, with `has_text_branch`, by texts.

    Built with fresh weights (`init_weights`). Runs in float32, or under autocast. Image features must
    have gone through `ln_vision`; text embeddings are the sums of word and position embeddings, positions
    counted from 0 whether or not queries stand in front.
    """

    def __init__(self, config: QFormerConfig, has_text_branch: bool) -> None:
        super().__init__()
        self.config = config
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.encoder = QFormerEncoder(config, has_text_branch=has_text_branch)
        init_weights(self, config.initializer_range)

    @property
    def layers(self) -> Sequence[QFormerLayer]:
        return self.encoder.layer  # type: ignore[return-value]  # a ModuleList of QFormerLayer

    def encode_queries(self, query_tokens: Tensor, image_features: Tensor) -> QueryStates:
        """Reads [B, P, V] images with [B, Q, D] queries; no text is near (uni-modal mask)."""
        image_features = self._readied(image_features)
        hidden_states = self._embed(query_tokens)
        cache: list[KeysValues] = []
        for layer in self.layers:
            keys_values = layer.keys_values(hidden_states)
            attended = layer.attend(hidden_states, keys_values, None)
            hidden_states = layer.finish_queries(attended, image_features)
            cache.append(keys_values)
        return QueryStates(query_output=hidden_states, keys_values=tuple(cache))

    def encode_texts(self, text_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Gives the [B, T, D] states of texts that see only themselves, in both directions (uni-modal mask).

        text_embeds: [B, T, D]. attention_mask: [B, T], 0 at padding.
        """
        hidden_states = self._embed(text_embeds)
        visible = attention_mask.bool()[:, None, None, :]  # [B, 1, 1, T]
        for layer in self.layers:
            attended = layer.attend(hidden_states, layer.keys_values(hidden_states), visible)
            hidden_states = layer.finish_texts(attended)
        return hidden_states

    def encode_pairs(
        self, query_tokens: Tensor, text_embeds: Tensor, attention_mask: Tensor, image_features: Tensor
    ) -> Tensor:
        """Gives the [B, Q + T, D] states of queries and texts that all see each other (bi-directional mask).

        query_tokens: [B, Q, D]. text_embeds: [B, T, D]. attention_mask: [B, T], 0 at padding.
        image_features: [B, P, V], seen by the queries alone.
        """
        num_queries = query_tokens.shape[1]
        image_features = self._readied(image_features)
        hidden_states = self._embed(torch.cat([query_tokens, text_embeds], dim=1))
        visible = F.pad(attention_mask.bool(), (num_queries, 0), value=True)[:, None, None, :]
        for layer in self.layers:
            attended = layer.attend(hidden_states, layer.keys_values(hidden_states), visible)
            queries = layer.finish_queries(attended[:, :num_queries], image_features)
            texts = layer.finish_texts(attended[:, num_queries:])
            hidden_states = torch.cat([queries, texts], dim=1)  # [B, Q + T, D]
        return hidden_states

    def decode_texts(
        self, text_embeds: Tensor, attention_mask: Tensor, keys_values: Sequence[KeysValues]
    ) -> Tensor:
        """Gives the [B, T, D] states of texts that see the queries and the texts before them.

        The multimodal causal mask of UniLM. Queries never see text under it, so their states are those of
        `encode_queries`, whose keys and values stand in for them here: only the texts are computed, and
        the image reaches them through the cache alone. Gradients flow through the cache.

        text_embeds: [B, T, D]. attention_mask: [B, T], 0 at padding. keys_values: `QueryStates.keys_values`.
        """
        hidden_states = self._embed(text_embeds)
        visible = _causal_after_queries(attention_mask, num_queries=keys_values[0][0].shape[2])
        for layer, of_queries in zip(self.layers, keys_values, strict=True):
            of_texts = layer.keys_values(hidden_states)
            keys, values = (torch.cat(pair, dim=2) for pair in zip(of_queries, of_texts, strict=True))
            hidden_states = layer.finish_texts(layer.attend(hidden_states, (keys, values), visible))
        return hidden_states

    def _readied(self, image_features: Tensor) -> Tensor:
        """Gives features in the type of the products with them, once for all layers."""
        layer = self.layers[0]
        assert layer.crossattention is not None, "the first layer sees the image"
        return image_features.to(layer.crossattention.attention.key.weight.dtype)

    def _embed(self, embeds: Tensor) -> Tensor:
        return self.dropout(self.layernorm(embeds))


def _causal_after_queries(attention_mask: Tensor, *, num_queries: int) -> Tensor:
    """Gives the [B, 1, T, Q + T] mask [ones | lower triangle], closed at padding."""
    visible = attention_mask.bool()[:, None, :].expand(-1, attention_mask.shape[1], -1).tril()  # [B, T, T]
    return F.pad(visible, (num_queries, 0), value=True)[:, None]


def init_weights(module: nn.Module, std: float) -> None:
    """Gives all layers below `module` BERT's initial weights: N(0, std), zero bias, LayerNorm 1 and 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
        if isinstance(part, nn.Linear | nn.LayerNorm) and part.bias is not None:
            nn.init.zeros_(part.bias)


def build_query_tokens(config: QFormerConfig) -> nn.Parameter:
    """Gives fresh queries, [1, Q, D], from N(0, initializer_range).

    Not zeros: equal queries stay equal in every layer, so all outputs would be one and the same.
    """
    tokens = torch.empty(1, config.num_query_tokens, config.hidden_size)
    return nn.Parameter(nn.init.normal_(tokens, std=config.initializer_range))


@torch.no_grad()
def copy_text_ffn_to_query_ffn(qformer: QFormer) -> None:
    """Starts the feed-forward networks of the queries as copies of those of the texts.

    Stage 1 does so after BERT's weights were loaded, which hold no query branch.
    """
    for layer in qformer.layers:
        assert layer.intermediate is not None, "this Q-Former was built without its text branch"
        assert layer.output is not None
        layer.intermediate_query.load_state_dict(layer.intermediate.state_dict())
        layer.output_query.load_state_dict(layer.output.state_dict())
