"""The stage-2 objective of an encoder-decoder language model (T5): prefix language modelling (BLIP-2, §3.3).

The encoder encodes the soft prompt and the prompt, the decoder decodes the answer. A caption is split at
random: its beginning is the prompt, the rest the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, T5ForConditionalGeneration
from transformers.modeling_outputs import Seq2SeqLMOutput

from training.data.batches import QaTurn

LONG_ANSWER_WORDS = 6  # longer answers are decoded apart, so that short ones are not padded to them
_IGNORED = -100


@dataclass(frozen=True, slots=True)
class EncodedTurns:
    """N QA turns, each about one image of a batch.

    `image` [N] is the index of the image; `prompt_ids` and `prompt_mask` [N, T] are padded on the right;
    `labels` [N, A] holds the answers with their end token (-100: padding) and `weights` [N, A] their weights.
    """

    image: Tensor
    prompt_ids: Tensor
    prompt_mask: Tensor
    labels: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class EncoderDecoderObjective:
    """Prefix language modelling of a T5 behind soft prompts."""

    llm: T5ForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast

    def loss(self, prefix: Tensor, qa_turns: Sequence[Sequence[QaTurn]]) -> Tensor:
        """Compute the mean loss of the answer tokens of each image's QA turns, prefix [B, Q, L]."""
        sums = []
        for group in group_by_length(split_captions(qa_turns)):
            encoded = encode_turns(group, self.tokenizer)
            sums.append(weighted_loss(run_encoder_decoder(self.llm, prefix, encoded).logits, encoded))
        return mean_loss(sums)


def encode_turns(turns: Sequence[tuple[int, QaTurn]], tokenizer: PreTrainedTokenizerFast) -> EncodedTurns:
    """Tokenise QA turns, each with the index of its image."""
    prompts = tokenizer([turn.prompt for _, turn in turns], padding=True, return_tensors="pt")
    answers = tokenizer([turn.answer for _, turn in turns], padding=True, return_tensors="pt")
    weights = torch.tensor([[turn.weight] for _, turn in turns])
    return EncodedTurns(
        image=torch.tensor([image for image, _ in turns]),
        prompt_ids=prompts.input_ids,
        prompt_mask=prompts.attention_mask,
        labels=answers.input_ids.masked_fill(answers.attention_mask == 0, _IGNORED),
        weights=weights * answers.attention_mask,
    )


def run_encoder_decoder(
    llm: T5ForConditionalGeneration, prefix: Tensor, encoded: EncodedTurns, **outputs: bool
) -> Seq2SeqLMOutput:
    """Encode each prompt behind its image's prefix of [B, Q, L] and decode its answer, teacher-forced."""
    turn_prefix = prefix[encoded.image]  # [N, Q, L]
    prompts = llm.get_input_embeddings()(encoded.prompt_ids.to(prefix.device))
    mask = encoded.prompt_mask.to(prefix.device)
    return llm(
        inputs_embeds=torch.cat([turn_prefix, prompts], dim=1),
        attention_mask=torch.cat([mask.new_ones(turn_prefix.shape[:2]), mask], dim=1),
        labels=encoded.labels.to(prefix.device),
        use_cache=False,
        **outputs,
    )


def weighted_loss(logits: Tensor, encoded: EncodedTurns) -> tuple[Tensor, Tensor]:
    """Compute the sum of the weighted cross-entropies of the answer tokens, and the sum of their weights."""
    labels, weights = encoded.labels.to(logits.device), encoded.weights.to(logits.device)
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=_IGNORED, reduction="none"
    )
    return (losses * weights.flatten()).sum(), weights.sum()


def mean_loss(sums: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Compute the weighted mean over groups of turns from the sums of `weighted_loss`."""
    return torch.stack([loss for loss, _ in sums]).sum() / torch.stack([weight for _, weight in sums]).sum()


def split_captions(qa_turns: Sequence[Sequence[QaTurn]]) -> list[tuple[int, QaTurn]]:
    """Return all turns with the index of their image; half of the captions are split into prompt and rest."""
    numbered = [(image, turn) for image, turns in enumerate(qa_turns) for turn in turns]
    return [(image, turn if turn.prompt else _split(turn)) for image, turn in numbered]


def _split(turn: QaTurn) -> QaTurn:
    words = turn.answer.split()
    if torch.rand(()) < 0.5:
        return turn
    index = int(torch.randint(len(words), ()))
    return replace(turn, prompt=" ".join(words[:index]), answer=" ".join(words[index:]))


def group_by_length(turns: Sequence[tuple[int, QaTurn]]) -> list[list[tuple[int, QaTurn]]]:
    """Group turns by long and short answers; an empty group is left out."""
    is_long = [len(turn.answer.split()) > LONG_ANSWER_WORDS for _, turn in turns]
    both = [list(compress(turns, is_long)), list(compress(turns, [not long for long in is_long]))]
    return [group for group in both if group]
