"""The stage-1 model: scores texts against images (paper, section 3.2).

image_features → ln_vision → (query_tokens, qformer) → query_output → image_embeds, [N, Q, E]
input_ids → embeddings → qformer → text_embeds, [M, E]
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from model.config import QFormerConfig
from model.errors import TaskUnavailableError
from model.qformer import ImageKeysValues, QFormer, QueryStates, build_query_tokens, init_weights
from model.qformer.layer import KeysValues
from model.qformer.text import TextEmbeddings, is_cut, tokenize_texts
from model.text_encoder import TextEncoder

INITIAL_TEMPERATURE = 0.07
MAX_TEXT_TOKENS = 32


class TextHeadTransform(nn.Module):
    """The hidden layer of BERT's language-modelling head."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(hidden_states)))


class TextHead(nn.Module):
    """BERT's language-modelling head, which predicts the next token in image-grounded text generation."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.transform = TextHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden_states)) + self.bias  # [.., N]


class Matcher(nn.Module):
    """The stage-1 model: contrastive similarity (ITC), matching (ITM) and grounded generation (ITG).

    Built with fresh weights: those of BERT inside the Q-Former, its embeddings and its text head, torch's
    own in the projections and `itm_head`. Runs in float32, or under autocast. Token ids may be on any
    device; they are moved to that of the weights.

    tokenizer: a BERT-like tokenizer with cls, sep, pad and bos ("[DEC]") tokens.
    max_text_tokens: of a text, [CLS] and [SEP] included.
    text_head: None where the checkpoint holds none (the Hub's retrieval format drops it).
    temperature: learned; divides cosine similarities to form a distribution over candidates.
    """

    def __init__(
        self,
        config: QFormerConfig,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_text_tokens: int = MAX_TEXT_TOKENS,
        vision_layer_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self._text_encoder = TextEncoder(tokenizer)
        self.max_text_tokens = max_text_tokens
        self.ln_vision = nn.LayerNorm(config.encoder_hidden_size, eps=vision_layer_norm_eps)
        self.query_tokens = build_query_tokens(config)
        self.qformer = QFormer(config, has_text_branch=True)
        self.embeddings = TextEmbeddings(config)
        self.vision_projection = nn.Linear(config.hidden_size, config.joint_size)
        self.text_projection = nn.Linear(config.hidden_size, config.joint_size)
        self.itm_head = nn.Linear(config.hidden_size, 2)
        self.text_head: TextHead | None = TextHead(config)
        self.temperature = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE))
        init_weights(self.text_head, config.initializer_range)
        init_weights(self.embeddings, config.initializer_range)
        self.tie_text_head()

    def tie_text_head(self) -> None:
        """Tie the output matrix of the text head to the word embeddings; needed after loading."""
        if self.text_head is not None:
            self.text_head.decoder.weight = self.embeddings.word_embeddings.weight

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the input_ids and attention_mask, [M, T] each; see `tokenize_texts`."""
        return tokenize_texts(self._text_encoder, texts, max_text_tokens=self.max_text_tokens)

    def is_cut(self, text: str) -> bool:
        """Whether `tokenize` cuts a text."""
        return is_cut(self._text_encoder, text, max_text_tokens=self.max_text_tokens)

    def project_images(self, image_features: Tensor) -> ImageKeysValues:
        """Compute what the queries attend to in [B, P, V] image features, as the vision encoder returns them.

        Where several passes are over the same images, as in training, they share it.
        """
        return self.qformer.project_images(self._normalize(image_features))

    def encode_image_queries(self, image: Tensor | ImageKeysValues) -> QueryStates:
        """Attend with the queries to B images: [B, P, V] features, or `project_images` of them."""
        source, query_tokens = self._image_inputs(image)
        return self.qformer.encode_queries(query_tokens, source)

    def embed_images(self, image_features: Tensor) -> Tensor:
        """Compute the [B, Q, E] unit vectors of [B, P, V] image features."""
        return self.image_embeds(self.encode_image_queries(image_features).query_output)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Compute the [M, E] unit vectors of texts."""
        return self.text_embeds(*self.tokenize(texts))

    def image_embeds(self, query_output: Tensor) -> Tensor:
        """Project [B, Q, D] query outputs to [B, Q, E] unit vectors, one per query."""
        return F.normalize(self.vision_projection(query_output).float(), dim=-1)

    def text_embeds(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Project texts, [M, T] ids, to [M, E] unit vectors, taken at [CLS]."""
        embeds, attention_mask = self._text_inputs(input_ids, attention_mask)
        hidden_states = self.qformer.encode_texts(embeds, attention_mask)
        return F.normalize(self.text_projection(hidden_states[:, 0]).float(), dim=-1)

    def itc_scores(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Compute the [N, M] similarities, in [-1, 1], of [N, Q, E] images and [M, E] texts.

        The cosine with the query that matches best (paper, section 3.2, ITC), not divided by the temperature.
        """
        # Outside of autocast: bfloat16 cosines differ by steps of 1/256, too coarse to rank by.
        with torch.autocast(image_embeds.device.type, enabled=False):
            return (image_embeds @ text_embeds.T).amax(dim=1)  # [N, Q, M] → [N, M]

    def match_logits(
        self, image: Tensor | ImageKeysValues, input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """Compute the [K, 2] matching logits of K pairs; index 1 is that of a match.

        The mean over the queries' logits (paper, section 3.2, ITM). image: [K, P, V] features as the vision
        encoder returns them, or `project_images` of them. input_ids, attention_mask: [K, T].
        """
        source, query_tokens = self._image_inputs(image)
        embeds, attention_mask = self._text_inputs(input_ids, attention_mask)
        hidden_states = self.qformer.encode_pairs(query_tokens, embeds, attention_mask, source)
        return self.itm_head(hidden_states[:, : query_tokens.shape[1]]).mean(dim=1)

    def generation_logits(
        self, input_ids: Tensor, attention_mask: Tensor, keys_values: Sequence[KeysValues]
    ) -> Tensor:
        """Compute the [B, T, N] logits of the token after each position (paper, section 3.2, ITG).

        input_ids: [B, T], with [DEC] in place of [CLS]. keys_values: of the images' queries.
        Raises TaskUnavailableError where the checkpoint held no text head.
        """
        return self._require_text_head()(self._decode_texts(input_ids, attention_mask, keys_values))

    def target_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        keys_values: Sequence[KeysValues],
        is_target: Tensor,
    ) -> Tensor:
        """Compute the [K, N] of `generation_logits` at the K positions where `is_target`, [B, T], is true.

        The vocabulary is the widest product of a training step, and many positions are padding.
        """
        hidden_states = self._decode_texts(input_ids, attention_mask, keys_values)
        return self._require_text_head()(hidden_states[is_target.to(hidden_states.device)])

    def _decode_texts(
        self, input_ids: Tensor, attention_mask: Tensor, keys_values: Sequence[KeysValues]
    ) -> Tensor:
        embeds, attention_mask = self._text_inputs(input_ids, attention_mask)
        return self.qformer.decode_texts(embeds, attention_mask, keys_values)

    def _require_text_head(self) -> TextHead:
        if self.text_head is None:
            raise TaskUnavailableError(
                "this checkpoint has no text head (text_head.*), so its Q-Former cannot "
                "generate text; load an adapter written by stage 1"
            )
        return self.text_head

    def _image_inputs(self, image: Tensor | ImageKeysValues) -> tuple[Tensor | ImageKeysValues, Tensor]:
        if isinstance(image, Tensor):
            return self._normalize(image), self.query_tokens.expand(len(image), -1, -1)
        first = image[0]
        assert first is not None, "the first layer attends to the image"
        return image, self.query_tokens.expand(len(first[0]), -1, -1)

    def _normalize(self, image_features: Tensor) -> Tensor:
        # Image features may be in half precision; ln_vision and all after it run in float32.
        normed: Tensor = self.ln_vision(image_features.float())
        return normed

    def _text_inputs(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        device = self.query_tokens.device
        return self.embeddings(input_ids.to(device)), attention_mask.to(device)
