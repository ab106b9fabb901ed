"""Shows the question to the Q-Former, for checkpoints that were trained so (paper, section 4.3, figure 7)."""

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from model.config import QFormerConfig
from model.qformer.text import TextEmbeddings, tokenize_texts


class QuestionReader(nn.Module):
    """Embeds questions for a Q-Former with a text branch, where queries and question see each other.

    tokenizer: a BERT-like one. max_text_tokens: the longest question it reads, [CLS] and [SEP] included.
    """

    def __init__(
        self, config: QFormerConfig, tokenizer: PreTrainedTokenizerFast, *, max_text_tokens: int = 32
    ) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.tokenizer = tokenizer
        self.max_text_tokens = max_text_tokens

    def forward(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Gives the [B, T, D] embeddings of B questions, and their [B, T] attention mask."""
        device = self.embeddings.word_embeddings.weight.device
        input_ids, mask = tokenize_texts(self.tokenizer, questions, max_text_tokens=self.max_text_tokens)
        return self.embeddings(input_ids.to(device)), mask.to(device)
