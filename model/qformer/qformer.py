"""The Q-Former: learned queries that attend to an image, and share self-attention with a text.

One encoder, four forward passes (paper, section 3.1 and figure 2), which differ in the attention mask:

    encode_queries   queries to queries and the image          image side of the contrastive loss
    encode_texts     texts to texts, in both directions        text side of the contrastive loss
    encode_pairs     all to all, queries to the image          image-text matching
    decode_texts     texts to queries and earlier tokens       image-grounded text generation

Tensor names are those of the published checkpoints, so weights load without a key table.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import QFormerConfig
from model.qformer.layer import KeysValues, QFormerLayer

# Of one or more images, for each layer: cross-attention keys and values, [B, H, P, K] each; None without.
ImageKeysValues = Sequence[KeysValues | None]


@dataclass(frozen=True, slots=True)
class QueryStates:
    """The result of one forward pass of the queries.

    query_output: [B, Q, D]. keys_values: the self-attention keys and values of the queries in each
    layer, [B, H, Q, K] each, which `QFormer.decode_texts` attends to.
    """

    query_output: Tensor
    keys_values: tuple[KeysValues, ...]


class QFormerEncoder(nn.Module):
    """The stack of layers; a module of its own, because its name is part of the tensor names."""

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
    """A BERT encoder shared by Q learned queries and, with `has_text_branch`, by texts.

    Built with fresh weights (`init_weights`). Runs in float32, or under autocast. Image features must
    be normalised by `ln_vision`. Text embeddings are the sums of word and position embeddings, positions
    counted from 0 even behind queries.
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

    def project_images(self, image_features: Tensor) -> ImageKeysValues:
        """Compute what the queries attend to in [B, P, V] images, for several passes over the same images.

        `encode_queries` and `encode_pairs` accept it in place of the features. They then take the memory of
        all layers' keys and values at once, where without gradients features need that of one.
        """
        image_features = self._cast(image_features)
        return [layer.image_keys_values(image_features) for layer in self.layers]

    def encode_queries(self, query_tokens: Tensor, image: Tensor | ImageKeysValues) -> QueryStates:
        """Attend with [B, Q, D] queries to images, without a text (uni-modal mask).

        image: [B, P, V] features, or `project_images` of them.
        """
        hidden_states = self._embed(query_tokens)
        cache: list[KeysValues] = []
        for layer, image_kv in zip(self.layers, self._image_keys_values(image), strict=True):
            keys_values = layer.keys_values(hidden_states)
            attended = layer.attend(hidden_states, keys_values, None)
            hidden_states = layer.finish_queries(attended, image_kv)
            cache.append(keys_values)
        return QueryStates(query_output=hidden_states, keys_values=tuple(cache))

    def encode_texts(self, text_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the [B, T, D] states of texts that attend to themselves, in both directions (uni-modal).

        text_embeds: [B, T, D]. attention_mask: [B, T], 0 at padding.
        """
        hidden_states = self._embed(text_embeds)
        visible = attention_mask.bool()[:, None, None, :]  # [B, 1, 1, T]
        for layer in self.layers:
            attended = layer.attend(hidden_states, layer.keys_values(hidden_states), visible)
            hidden_states = layer.finish_texts(attended)
        return hidden_states

    def encode_pairs(
        self,
        query_tokens: Tensor,
        text_embeds: Tensor,
        attention_mask: Tensor,
        image: Tensor | ImageKeysValues,
    ) -> Tensor:
        """Return the [B, Q + T, D] states of queries and texts that attend to all (bi-directional mask).

        query_tokens: [B, Q, D]. text_embeds: [B, T, D]. attention_mask: [B, T], 0 at padding.
        image: [B, P, V] features, or `project_images` of them; for the queries alone.
        """
        num_queries = query_tokens.shape[1]
        hidden_states = self._embed(torch.cat([query_tokens, text_embeds], dim=1))
        visible = F.pad(attention_mask.bool(), (num_queries, 0), value=True)[:, None, None, :]
        for layer, image_kv in zip(self.layers, self._image_keys_values(image), strict=True):
            attended = layer.attend(hidden_states, layer.keys_values(hidden_states), visible)
            queries = layer.finish_queries(attended[:, :num_queries], image_kv)
            texts = layer.finish_texts(attended[:, num_queries:])
            hidden_states = torch.cat([queries, texts], dim=1)  # [B, Q + T, D]
        return hidden_states

    def decode_texts(
        self, text_embeds: Tensor, attention_mask: Tensor, keys_values: Sequence[KeysValues]
    ) -> Tensor:
        """Return the [B, T, D] states of texts that attend to the queries and to earlier tokens.

        The multimodal causal mask of UniLM. Queries never attend to text under it, so their states are those
        of `encode_queries`, whose keys and values are used here: only the texts are computed, and the image
        reaches them through the cache alone. Gradients flow through the cache.

        text_embeds: [B, T, D]. attention_mask: [B, T], 0 at padding. keys_values: `QueryStates.keys_values`.
        """
        hidden_states = self._embed(text_embeds)
        visible = _causal_after_queries(attention_mask, num_queries=keys_values[0][0].shape[2])
        for layer, query_kv in zip(self.layers, keys_values, strict=True):
            text_kv = layer.keys_values(hidden_states)
            keys, values = (torch.cat(pair, dim=2) for pair in zip(query_kv, text_kv, strict=True))
            hidden_states = layer.finish_texts(layer.attend(hidden_states, (keys, values), visible))
        return hidden_states

    def _image_keys_values(self, image: Tensor | ImageKeysValues) -> Iterable[KeysValues | None]:
        """Return the keys and values of each layer, computed when it is reached if they are not given."""
        if not isinstance(image, Tensor):
            return image
        image_features = self._cast(image)
        return (layer.image_keys_values(image_features) for layer in self.layers)

    def _cast(self, image_features: Tensor) -> Tensor:
        """Cast features to the type of their products, once for all layers."""
        layer = self.layers[0]
        assert layer.crossattention is not None, "the first layer attends to the image"
        return image_features.to(layer.crossattention.attention.key.weight.dtype)

    def _embed(self, embeds: Tensor) -> Tensor:
        return self.dropout(self.layernorm(embeds))


def _causal_after_queries(attention_mask: Tensor, *, num_queries: int) -> Tensor:
    """Return the [B, 1, T, Q + T] mask [ones | lower triangle], false at padding."""
    visible = attention_mask.bool()[:, None, :].expand(-1, attention_mask.shape[1], -1).tril()  # [B, T, T]
    return F.pad(visible, (num_queries, 0), value=True)[:, None]


def select_images(keys_values: ImageKeysValues, index: Tensor) -> ImageKeysValues:
    """Return the cross-attention keys and values of the images `index` [K], of which some may recur."""
    return [
        None if layer is None else (layer[0].index_select(0, index), layer[1].index_select(0, index))
        for layer in keys_values
    ]


def init_weights(module: nn.Module, std: float) -> None:
    """Initialise all layers of `module` as BERT: weights N(0, std), biases 0, LayerNorm weights 1."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            nn.init.normal_(layer.weight, std=std)
        if isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
        if isinstance(layer, nn.Linear | nn.LayerNorm) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


def build_query_tokens(config: QFormerConfig) -> nn.Parameter:
    """Initialise query tokens, [1, Q, D], from N(0, initializer_range).

    Not zeros: equal queries stay equal in every layer, so all outputs would be equal.
    """
    tokens = torch.empty(1, config.num_query_tokens, config.hidden_size)
    return nn.Parameter(nn.init.normal_(tokens, std=config.initializer_range))


@torch.no_grad()
def copy_text_ffn_to_query_ffn(qformer: QFormer) -> None:
    """Copy the feed-forward networks of the texts to those of the queries.

    Stage 1 calls it after loading BERT's weights, which hold no query branch.
    """
    for layer in qformer.layers:
        assert layer.intermediate is not None, "this Q-Former was built without its text branch"
        assert layer.output is not None
        layer.intermediate_query.load_state_dict(layer.intermediate.state_dict())
        layer.output_query.load_state_dict(layer.output.state_dict())
