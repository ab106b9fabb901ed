"""The stage-2 objective of an encoder-decoder language model (T5): prefix language modelling (BLIP-2, §3.3).

The encoder encodes the soft prompt and the prompt, the decoder decodes the answer. A caption without a prompt
is split at random: its beginning is the prompt, the rest the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput

from model.language import LanguageModel
from training.data.batches import QaTurn
from training.stages.turn_tokenizer import TurnTokenizer

LONG_ANSWER_WORDS = 6  # longer answers are decoded apart, so that short ones are not padded to them
WHOLE_SHARE = 0.5
_IGNORED = -100


@dataclass(frozen=True, slots=True)
class EncodedTurns:
    """N QA turns, each about one image of a batch.

    `image` [N] is the index of the image; `prompt_ids` and `prompt_mask` [N, T] are padded on the right;
    `decoder_input_ids` [N, A] are the answers behind the token that starts one; `labels` [N, A] holds the
    answers with their end token (-100: padding) and `weights` [N, A] their weights.
    """

    image: Tensor
    prompt_ids: Tensor
    prompt_mask: Tensor
    decoder_input_ids: Tensor
    labels: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> "EncodedTurns":
        return EncodedTurns(*(getattr(self, name).to(device) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class EncoderDecoderObjective:
    """Prefix language modelling behind soft prompts.

    max_text_tokens: of an answer, its end token included; prompts are limited by the model's positions alone.
    whole_share: of the captions without a prompt that are not split. The paper splits all (0); but a model
    that is asked for captions without a prompt, as the service does by default, must have seen whole ones.
    """

    language_model: LanguageModel
    tokenizer: TurnTokenizer
    max_text_tokens: int
    whole_share: float = WHOLE_SHARE

    @property
    def llm(self) -> PreTrainedModel:
        return self.language_model.llm

    def loss(self, prefix: Tensor, qa_turns: Sequence[Sequence[QaTurn]]) -> Tensor:
        """Compute the mean loss of the answer tokens of each image's QA turns, prefix [B, Q, L]."""
        limit = min(self.max_text_tokens, self.language_model.max_positions)
        sums = []
        for group in group_by_length(split_captions(qa_turns, whole_share=self.whole_share)):
            encoded = encode_turns(group, self.language_model, self.tokenizer, max_text_tokens=limit)
            encoded = encoded.to(prefix.device)
            sums.append(weighted_loss(run_encoder_decoder(self.llm, prefix, encoded).logits, encoded))
        return mean_loss(sums)


def encode_turns(
    turns: Sequence[tuple[int, QaTurn]],
    language_model: LanguageModel,
    tokenizer: TurnTokenizer,
    *,
    max_text_tokens: int,
) -> EncodedTurns:
    """Tokenise QA turns, each with the index of its image."""
    prompts = [torch.tensor(tokenizer.prompt_ids(turn.prompt), dtype=torch.long) for _, turn in turns]
    answers = [
        torch.tensor(tokenizer.answer_ids(turn.answer, max_tokens=max_text_tokens)) for _, turn in turns
    ]
    end = tokenizer.end_token_id
    start_id = language_model.llm.config.decoder_start_token_id
    labels = pad_sequence(answers, batch_first=True, padding_value=_IGNORED)
    padded = pad_sequence(answers, batch_first=True, padding_value=end)
    prompt_mask = pad_sequence([torch.ones_like(ids) for ids in prompts], batch_first=True)
    return EncodedTurns(
        image=torch.tensor([image for image, _ in turns]),
        prompt_ids=pad_sequence(prompts, batch_first=True, padding_value=end),
        prompt_mask=prompt_mask,
        decoder_input_ids=F.pad(padded[:, :-1], (1, 0), value=start_id),
        labels=labels,
        weights=torch.tensor([[turn.weight] for _, turn in turns]) * (labels != _IGNORED),
    )


def run_encoder_decoder(
    llm: PreTrainedModel, prefix: Tensor, encoded: EncodedTurns, **outputs: bool
) -> Seq2SeqLMOutput:
    """Encode each prompt behind its image's prefix of [B, Q, L] and decode its answer, teacher-forced."""
    turn_prefix = prefix[encoded.image]  # [N, Q, L]
    prompts = llm.get_input_embeddings()(encoded.prompt_ids)
    mask = encoded.prompt_mask
    return llm(
        inputs_embeds=torch.cat([turn_prefix.to(prompts.dtype), prompts], dim=1),
        attention_mask=torch.cat([mask.new_ones(turn_prefix.shape[:2]), mask], dim=1),
        decoder_input_ids=encoded.decoder_input_ids,
        use_cache=False,
        **outputs,
    )


def weighted_loss(logits: Tensor, encoded: EncodedTurns) -> tuple[Tensor, Tensor]:
    """Compute the sum of the weighted cross-entropies of the answer tokens, and the sum of their weights."""
    labels = encoded.labels.flatten()
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels, ignore_index=_IGNORED, reduction="none")
    return (losses * encoded.weights.flatten()).sum(), encoded.weights.sum()


def mean_loss(sums: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Compute the weighted mean over groups of turns from the sums of `weighted_loss`."""
    return torch.stack([loss for loss, _ in sums]).sum() / torch.stack([weight for _, weight in sums]).sum()


def split_captions(
    qa_turns: Sequence[Sequence[QaTurn]], *, whole_share: float = WHOLE_SHARE
) -> list[tuple[int, QaTurn]]:
    """Return all turns with the index of their image; captions without a prompt are split, or stay whole.

    The prompt of a split caption is its first word, or its first words up to the midpoint of the caption,
    with equal probability of each length. A caption of one word stays whole.
    """
    numbered = [(image, turn) for image, turns in enumerate(qa_turns) for turn in turns]
    return [(image, turn if turn.prompt else _split(turn, whole_share)) for image, turn in numbered]


def _split(turn: QaTurn, whole_share: float) -> QaTurn:
    words = turn.answer.split()
    midpoint = len(words) // 2
    if midpoint == 0 or torch.rand(()) < whole_share:
        return turn
    index = int(torch.randint(1, midpoint + 1, ()))
    return replace(turn, prompt=" ".join(words[:index]), answer=" ".join(words[index:]))


def group_by_length(turns: Sequence[tuple[int, QaTurn]]) -> list[list[tuple[int, QaTurn]]]:
    """Group turns by long and short answers; an empty group is left out."""
    is_long = [len(turn.answer.split()) > LONG_ANSWER_WORDS for _, turn in turns]
    both = [list(compress(turns, is_long)), list(compress(turns, [not long for long in is_long]))]
    return [group for group in both if group]
