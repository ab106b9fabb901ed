"""The layers of the Q-Former: BERT's post-norm blocks, with cross-attention and a second FFN for queries."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import QFormerConfig

KeysValues = tuple[Tensor, Tensor]  # keys and values of one layer, [B, H, T, K] each


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention whose keys and values may come from another sequence."""

    def __init__(self, config: QFormerConfig, source_size: int) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(source_size, config.hidden_size)
        self.value = nn.Linear(source_size, config.hidden_size)

    def keys_values(self, source: Tensor) -> KeysValues:
        """Compute the keys and values, [B, H, S, K] each, of a [B, S, …] source."""
        return self._split_heads(self.key(source)), self._split_heads(self.value(source))

    def forward(self, hidden_states: Tensor, keys_values: KeysValues, visible: Tensor | None) -> Tensor:
        """Attend with [B, T, D] states to the keys and values; return [B, T, D].

        visible: true where a state may attend, broadcast to [B, H, T, S]; None: everywhere.
        """
        keys, values = keys_values
        queries = self._split_heads(self.query(hidden_states)).to(keys.dtype) * self.head_size**-0.5
        # Not scaled_dot_product_attention: at these sizes its bfloat16 backward on a CPU takes 3-6 times
        # as long as two products and a softmax, and in float32 the two are within a quarter of each other.
        scores = queries @ keys.transpose(-1, -2)  # [B, H, T, S]
        if visible is not None:
            # The smallest finite score, not -inf: a row without a visible key (an empty text) stays finite.
            scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        weights = F.dropout(scores.softmax(dim=-1), self.dropout, self.training)
        return (weights @ values).transpose(1, 2).flatten(2)  # [B, T, D]

    def _split_heads(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:-1], self.num_heads, self.head_size).transpose(1, 2)  # [B, H, T, K]


class ResidualOutput(nn.Module):
    """The end of each sub-block of BERT: linear, dropout, then LayerNorm of the sum with the residual."""

    def __init__(self, config: QFormerConfig, input_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(states)) + residual)


class Attention(nn.Module):
    """Attention with its output block; self-attention or, with an image source, cross-attention."""

    def __init__(self, config: QFormerConfig, source_size: int) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(config, source_size)
        self.output = ResidualOutput(config, config.hidden_size)

    def forward(
        self, hidden_states: Tensor, keys_values: KeysValues, visible: Tensor | None = None
    ) -> Tensor:
        return self.output(self.attention(hidden_states, keys_values, visible), hidden_states)


class Intermediate(nn.Module):
    """The widening half of a feed-forward network, with the exact (erf) GELU of BERT."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.gelu(self.dense(hidden_states))


class QFormerLayer(nn.Module):
    """One layer: self-attention for all, then separate feed-forward networks for queries and texts."""

    def __init__(self, config: QFormerConfig, *, has_cross_attention: bool, has_text_branch: bool) -> None:
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        self.crossattention = Attention(config, config.encoder_hidden_size) if has_cross_attention else None
        self.intermediate_query = Intermediate(config)
        self.output_query = ResidualOutput(config, config.intermediate_size)
        self.intermediate = Intermediate(config) if has_text_branch else None
        self.output = ResidualOutput(config, config.intermediate_size) if has_text_branch else None

    def keys_values(self, hidden_states: Tensor) -> KeysValues:
        """Compute the self-attention keys and values of these states, [B, H, T, K] each."""
        return self.attention.attention.keys_values(hidden_states)

    def attend(self, hidden_states: Tensor, keys_values: KeysValues, visible: Tensor | None) -> Tensor:
        """Apply self-attention of [B, T, D] states to the given keys and values, where `visible` is true."""
        return self.attention(hidden_states, keys_values, visible)

    def image_keys_values(self, image_features: Tensor) -> KeysValues | None:
        """Compute the cross-attention keys and values of [B, P, V] images; None in layers without it."""
        if self.crossattention is None:
            return None
        return self.crossattention.attention.keys_values(image_features)

    def finish_queries(self, attended: Tensor, image_keys_values: KeysValues | None) -> Tensor:
        """Apply cross-attention to the image, where this layer has it, and the FFN of queries, [B, Q, D]."""
        if self.crossattention is not None:
            assert image_keys_values is not None, "this layer attends to the image"
            attended = self.crossattention(attended, image_keys_values)
        return self.output_query(self.intermediate_query(attended), attended)

    def finish_texts(self, attended: Tensor) -> Tensor:
        """Apply the FFN of texts, [B, T, D]; they never attend to the image directly."""
        assert self.intermediate is not None, "this Q-Former was built without its text branch"
        assert self.output is not None
        return self.output(self.intermediate(attended), attended)
