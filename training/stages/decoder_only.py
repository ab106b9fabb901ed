"""The stage-2 objective of a decoder-only language model (OPT): the QA turns of an image, packed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import OPTForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPast

from model.language import find_eos_token_ids
from training.data.batches import QaTurn
from training.data.packing import PackedBatch, WeightedText, pack_texts, packed_attention_mask


@dataclass(frozen=True, slots=True)
class DecoderOnlyObjective:
    """Language modelling of an OPT: all QA turns of an image are packed behind its soft prompt."""

    llm: OPTForCausalLM
    tokenizer: PreTrainedTokenizerFast

    def loss(self, prefix: Tensor, qa_turns: Sequence[Sequence[QaTurn]]) -> Tensor:
        """Compute the mean loss of the answer tokens of each image's QA turns, prefix [B, Q, L]."""
        end_token_id = find_eos_token_ids(self.llm)[0]
        texts = [
            [tokenize_qa_turn(turn, self.tokenizer, end_token_id) for turn in turns] for turns in qa_turns
        ]
        batch = pack_texts(texts, prefix.shape[1], self.tokenizer.pad_token_id).to(prefix.device)
        return packed_lm_loss(self.llm, run_packed(self.llm, prefix, batch).last_hidden_state, batch)


def tokenize_qa_turn(
    turn: QaTurn, tokenizer: PreTrainedTokenizerFast, end_token_id: int, prompt_weight: float = 0.0
) -> WeightedText:
    """Tokenise a QA turn as one text from begin to end token.

    The ids of the prompt are those it has alone, as when the model is asked. The answer follows behind a
    space: " red" and "red" are different tokens of OPT, and an answer is generated with the former.
    Answer and end token have the turn's loss weight, the prompt has `prompt_weight`. The first word of a
    prompt is never a target: without a prompt, a caption follows the begin token.
    """
    prompt = tokenizer(turn.prompt).input_ids
    answer = [*_tokenize_answer(turn, tokenizer), end_token_id]
    prompt_weights = [0.0, 0.0, *[prompt_weight] * len(prompt)][: len(prompt)]
    return WeightedText((*prompt, *answer), (*prompt_weights, *[turn.weight] * len(answer)))


def _tokenize_answer(turn: QaTurn, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    has_no_gap = not turn.prompt or not turn.answer or turn.prompt[-1].isspace()
    answer = turn.answer if has_no_gap else f" {turn.answer}"
    prompt, whole, alone = (
        tokenizer(text, add_special_tokens=False).input_ids
        for text in (turn.prompt, turn.prompt + answer, answer)
    )
    is_continued = whole[: len(prompt)] == prompt  # else prompt and answer share a token
    return whole[len(prompt) :] if is_continued else alone


def run_packed(
    llm: OPTForCausalLM, prefix: Tensor, batch: PackedBatch, **outputs: bool
) -> BaseModelOutputWithPast:
    """Run the decoder over a prefix [B, Q, L] and the packed texts; `outputs` selects optional outputs."""
    batch_size, prefix_length = prefix.shape[:2]
    # an fp32 mask would widen every bf16 attention score
    mask_dtype = (
        torch.get_autocast_dtype(prefix.device.type)
        if torch.is_autocast_enabled(prefix.device.type)
        else prefix.dtype
    )
    prefix_positions = torch.arange(prefix_length, device=prefix.device).expand(batch_size, -1)
    return llm.model(
        inputs_embeds=torch.cat([prefix, llm.get_input_embeddings()(batch.input_ids)], dim=1),
        attention_mask=packed_attention_mask(batch.segments, prefix_length, mask_dtype),
        position_ids=torch.cat([prefix_positions, batch.position_ids], dim=1),
        use_cache=False,
        **outputs,
    )


def packed_lm_loss(llm: OPTForCausalLM, last_hidden_state: Tensor, batch: PackedBatch) -> Tensor:
    """Compute the weighted mean cross-entropy of packed texts from the states [B, Q+T, L]."""
    targets = batch.weights > 0
    text_states = last_hidden_state[:, -batch.input_ids.shape[1] :]  # [B, T, L]
    logits = llm.lm_head(text_states[targets]).float()  # [targets, N]
    losses = F.cross_entropy(logits, batch.labels[targets], reduction="none")
    weights = batch.weights[targets]
    return (losses * weights).sum() / weights.sum()
