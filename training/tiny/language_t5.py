"""Unimodal pre-training of an encoder-decoder language model (T5) on texts of the synthetic world.

Its encoder reads a dense description (in stage 2: the soft prompt) and a prompt behind it, its decoder says
the answer. A caption is split at random: its beginning is the prompt, the rest the answer (prefix language
modelling; BLIP-2, section 3.3).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import Seq2SeqLMOutput

from training.config import EncoderDecoderShape, TinyConfig
from training.loop import Losses, Run, train
from training.tiny.attention_supervision import ReadingHeads, ReadText, find_mentions
from training.tiny.language import READING_WEIGHT, embed_descriptions, order_cells
from training.world.qa_turns import Exchange, sample_exchanges
from training.world.scenes import Scene

_LONG_ANSWER = 6  # words; longer answers are decoded apart, so that short ones are not padded to them
_NO_TARGET = -100


@dataclass(frozen=True, slots=True)
class EncodedExchanges:
    """N exchanges, each about one image of a batch.

    `image` [N] numbers the image; `prompt_ids` and `prompt_mask` [N, T] are padded on the right; `labels`
    [N, A] holds the answers with their end token (-100: padding) and `weights` [N, A] their loss weights.
    """

    image: Tensor
    prompt_ids: Tensor
    prompt_mask: Tensor
    labels: Tensor
    weights: Tensor


def build_encoder_decoder(
    shape: EncoderDecoderShape, tokenizer: PreTrainedTokenizerFast
) -> T5ForConditionalGeneration:
    """An untrained T5 without dropout, of Flan-T5's kind: gated GELU, output head of its own."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=shape.hidden_size,
        d_kv=shape.hidden_size // shape.num_attention_heads,
        d_ff=shape.intermediate_size,
        num_layers=shape.num_encoder_layers,
        num_decoder_layers=shape.num_decoder_layers,
        num_heads=shape.num_attention_heads,
        relative_attention_num_buckets=64,
        relative_attention_max_distance=64,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    model = T5ForConditionalGeneration(config)
    nn.init.normal_(model.lm_head.weight, std=shape.hidden_size**-0.5)
    for stack in (model.encoder, model.decoder):  # distances that matter from the first step on
        nn.init.normal_(stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight, std=2.0)
    order_cells(model.get_input_embeddings().weight, tokenizer)
    return model


def encode_exchanges(
    exchanges: Sequence[tuple[int, Exchange]], tokenizer: PreTrainedTokenizerFast
) -> EncodedExchanges:
    """Tokenises exchanges, each with the number of its image."""
    prompts = tokenizer([item.prompt for _, item in exchanges], padding=True, return_tensors="pt")
    answers = tokenizer([item.answer for _, item in exchanges], padding=True, return_tensors="pt")
    weights = torch.tensor([[item.weight] for _, item in exchanges])
    return EncodedExchanges(
        image=torch.tensor([image for image, _ in exchanges]),
        prompt_ids=prompts.input_ids,
        prompt_mask=prompts.attention_mask,
        labels=answers.input_ids.masked_fill(answers.attention_mask == 0, _NO_TARGET),
        weights=weights * answers.attention_mask,
    )


def run_encoder_decoder(
    llm: T5ForConditionalGeneration, prefix: Tensor, encoded: EncodedExchanges, **outputs: bool
) -> Seq2SeqLMOutput:
    """Encodes each prompt behind its image's prefix of [B, Q, L] and decodes its answer, teacher-forced."""
    own_prefix = prefix[encoded.image]  # [N, Q, L]
    prompts = llm.get_input_embeddings()(encoded.prompt_ids.to(prefix.device))
    mask = encoded.prompt_mask.to(prefix.device)
    return llm(
        inputs_embeds=torch.cat([own_prefix, prompts], dim=1),
        attention_mask=torch.cat([mask.new_ones(own_prefix.shape[:2]), mask], dim=1),
        labels=encoded.labels.to(prefix.device),
        use_cache=False,
        **outputs,
    )


def weighted_loss(logits: Tensor, encoded: EncodedExchanges) -> tuple[Tensor, Tensor]:
    """The sum of the weighted cross-entropies of the answers' words, and the sum of the weights."""
    labels, weights = encoded.labels.to(logits.device), encoded.weights.to(logits.device)
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=_NO_TARGET, reduction="none"
    )
    return (losses * weights.flatten()).sum(), weights.sum()


@dataclass(frozen=True, slots=True)
class T5Reader:
    """T5 behind soft prompts."""

    llm: T5ForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast

    def loss(self, prefix: Tensor, exchanges: Sequence[Sequence[Exchange]]) -> Tensor:
        """The mean loss of the answers' words, of each image's exchanges behind its prefix [B, Q, L]."""
        sums = []
        for group in group_by_length(split_captions(exchanges)):
            encoded = encode_exchanges(group, self.tokenizer)
            sums.append(weighted_loss(run_encoder_decoder(self.llm, prefix, encoded).logits, encoded))
        return torch.stack([loss for loss, _ in sums]).sum() / torch.stack([w for _, w in sums]).sum()


def split_captions(exchanges: Sequence[Sequence[Exchange]]) -> list[tuple[int, Exchange]]:
    """All exchanges with the numbers of their images; half of the captions split into prompt and rest."""
    numbered = [(image, item) for image, row in enumerate(exchanges) for item in row]
    return [(image, item if item.prompt else _split(item)) for image, item in numbered]


def _split(item: Exchange) -> Exchange:
    words = item.answer.split()
    if torch.rand(()) < 0.5:
        return item
    at = int(torch.randint(len(words), ()))
    return replace(item, prompt=" ".join(words[:at]), answer=" ".join(words[at:]))


def group_by_length(exchanges: Sequence[tuple[int, Exchange]]) -> list[list[tuple[int, Exchange]]]:
    """Exchanges with long answers and with short ones; a group that would be empty is left out."""
    is_long = [len(item.answer.split()) > _LONG_ANSWER for _, item in exchanges]
    both = [list(compress(exchanges, is_long)), list(compress(exchanges, [not long for long in is_long]))]
    return [group for group in both if group]


def pretrain_encoder_decoder(
    run: Run, config: TinyConfig, scenes: Sequence[Scene], tokenizer: PreTrainedTokenizerFast
) -> T5ForConditionalGeneration:
    """Trains T5 to read dense descriptions; resumes where a former run stopped."""
    torch.manual_seed(config.seed)
    llm = build_encoder_decoder(config.language_model_t5, tokenizer).to(run.device)
    heads = ReadingHeads(config.language_model_t5.hidden_size).to(run.device)
    length, optimization = config.qformer.num_query_tokens, config.language_pretraining_t5

    def step(rng: np.random.Generator) -> Losses:
        chosen = [scenes[int(i)] for i in rng.integers(len(scenes), size=optimization.batch_size)]
        exchanges = [sample_exchanges(scene, rng, config.num_questions) for scene in chosen]
        prefix = embed_descriptions(llm, tokenizer, chosen, length)
        sums, reading = [], {}
        groups = group_by_length(split_captions(exchanges))
        for group in groups:
            encoded = encode_exchanges(group, tokenizer)
            output = run_encoder_decoder(
                llm, prefix, encoded, output_hidden_states=True, output_attentions=True
            )
            sums.append(weighted_loss(output.logits, encoded))
            if group is groups[-1]:  # the questions
                mentions = find_mentions(_read_prompts(group, length), [chosen[image] for image, _ in group])
                states, attentions = output.encoder_hidden_states[1:], output.encoder_attentions
                reading = heads.losses(states, attentions, mentions.to(run.device))
        loss_lm = torch.stack([loss for loss, _ in sums]).sum() / torch.stack([w for _, w in sums]).sum()
        loss = loss_lm + READING_WEIGHT * torch.stack(list(reading.values())).sum()
        return {"loss": loss, "loss_lm": loss_lm, **reading}

    train(run, nn.ModuleDict({"llm": llm, "heads": heads}), step, optimization)
    return llm.eval()


def _read_prompts(group: Sequence[tuple[int, Exchange]], prefix_length: int) -> list[list[ReadText]]:
    read = []
    for _, item in group:
        prompt = item.prompt.lower().replace("?", " ?").replace(":", " :").split()
        read.append([ReadText([*prompt, *item.answer.split()], prefix_length, len(prompt))])
    return read
