"""The configuration of the Q-Former; the frozen models bring their own."""

from dataclasses import dataclass, fields

MAX_LAYERS = 512  # of any model


@dataclass(frozen=True, slots=True)
class QFormerConfig:
    """The sizes of a Q-Former, its text branch and its heads (paper, section 3.1).

    The trunk is a BERT encoder; the defaults are BERT's own. The fields are named as the published
    checkpoints name them, but for `joint_size`, which they call `image_text_hidden_size`.

    hidden_size: D. encoder_hidden_size: V, the width of the image features. num_query_tokens: Q.
    joint_size: E, the width of the contrastive embeddings. cross_attention_frequency: a layer whose
    index is a multiple of it attends to the image.

    Raises ValueError where the sizes cannot form a Q-Former.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    encoder_hidden_size: int
    num_query_tokens: int
    vocab_size: int
    max_position_embeddings: int
    joint_size: int
    cross_attention_frequency: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"{field.name} is {value}; it must be at least 1")
            if field.type is float and not 0 <= value <= 1:
                raise ValueError(f"{field.name} is {value}; it must be between 0 and 1")
        if self.num_hidden_layers > MAX_LAYERS:
            raise ValueError(f"num_hidden_layers is {self.num_hidden_layers}; the limit is {MAX_LAYERS}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; change one of the two"
            )
