"""The texts of the Q-Former: tokens and embeddings."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from model.config import QFormerConfig
from model.text_encoder import TextEncoder


class TextEmbeddings(nn.Module):
    """Word plus absolute position embeddings; their LayerNorm is the Q-Former's."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = self.position_embeddings.weight[: input_ids.shape[1]]
        return self.word_embeddings(input_ids) + positions  # [M, T, D]


class QuestionEmbedder(nn.Module):
    """Embeds questions for a Q-Former with a text branch, where queries and question attend to each other.

    For checkpoints that were trained so (paper, section 4.3, figure 7). tokenizer: a BERT-like one.
    max_text_tokens: of a question, [CLS] and [SEP] included.
    """

    def __init__(
        self, config: QFormerConfig, tokenizer: PreTrainedTokenizerFast, *, max_text_tokens: int = 32
    ) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.tokenizer = tokenizer
        self._encoder = TextEncoder(tokenizer)
        self.max_text_tokens = max_text_tokens

    def is_cut(self, question: str) -> bool:
        """Whether the end of a question is not read."""
        return is_cut(self._encoder, question, max_text_tokens=self.max_text_tokens)

    def forward(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the [B, T, D] embeddings of B questions, and their [B, T] attention mask."""
        device = self.embeddings.word_embeddings.weight.device
        input_ids, mask = tokenize_texts(self._encoder, questions, max_text_tokens=self.max_text_tokens)
        return self.embeddings(input_ids.to(device)), mask.to(device)


def tokenize_texts(
    encoder: TextEncoder, texts: Sequence[str], *, max_text_tokens: int
) -> tuple[Tensor, Tensor]:
    """Return the input_ids and attention_mask, [M, T] each, of texts as [CLS] … [SEP].

    A text longer than `max_text_tokens` is cut at its end but keeps its [SEP]. Padded on the right to the
    longest. On the CPU. Thread-safe.
    """
    tokenizer = encoder.tokenizer
    rows = [encoder.encode(text) for text in texts]
    rows = [[tokenizer.cls_token_id, *row[: max_text_tokens - 2], tokenizer.sep_token_id] for row in rows]
    length = max((len(row) for row in rows), default=2)
    input_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row)
        attention_mask[index, : len(row)] = 1
    return input_ids, attention_mask


def is_cut(encoder: TextEncoder, text: str, *, max_text_tokens: int) -> bool:
    """Whether `tokenize_texts` cuts a text. Thread-safe."""
    return len(encoder.encode(text)) > max_text_tokens - 2
