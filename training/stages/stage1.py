"""Stage 1: vision-language representation learning with a frozen image encoder (BLIP-2, §3.2).

ITC, ITM with hard negatives and ITG are summed 1:1:1. Each step passes through the Q-Former four times:
queries over B images, B texts, matched and mismatched pairs, and texts over the cached queries.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from model.config import QFormerConfig
from model.matching import Matcher
from model.qformer import KeysValues, copy_text_ffn_to_query_ffn
from training.config import QFormerShape, Stage1Config
from training.data.batches import PairBatch, PairSampler
from training.loop import Losses, Run, train
from training.losses import itc_loss, itg_labels, itg_loss, itm_loss, sample_hard_negatives


def build_matcher(
    shape: QFormerShape, *, encoder_hidden_size: int, tokenizer: PreTrainedTokenizerFast
) -> Matcher:
    """Build an untrained stage-1 model; the query FFNs are initialised with the text FFNs."""
    config = QFormerConfig(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        intermediate_size=shape.intermediate_size,
        encoder_hidden_size=encoder_hidden_size,
        num_query_tokens=shape.num_query_tokens,
        vocab_size=len(tokenizer),
        max_position_embeddings=shape.max_text_tokens,
        joint_size=shape.joint_size,
        cross_attention_frequency=shape.cross_attention_frequency,
        hidden_dropout_prob=shape.dropout,
        attention_probs_dropout_prob=shape.dropout,
    )
    matcher = Matcher(config, tokenizer, max_text_tokens=shape.max_text_tokens)
    copy_text_ffn_to_query_ffn(matcher.qformer)
    return matcher


def train_matcher(run: Run, matcher: Matcher, sample_batch: PairSampler, config: Stage1Config) -> Matcher:
    """Train a stage-1 model in place; resumes from its last checkpoint."""
    matcher.to(run.device).train().requires_grad_(True)

    def step(index: int, rng: np.random.Generator) -> Losses:
        return stage1_losses(matcher, sample_batch(index, rng).to(run.device), config.num_pairs)

    train(run, matcher, step, config.optimization)
    return matcher.eval()


def stage1_losses(matcher: Matcher, batch: PairBatch, num_pairs: int) -> Losses:
    """Compute the three losses and their sum: ITC over the whole batch, ITM and ITG over `num_pairs` pairs.

    ITC needs many in-batch negatives. The passes that join image and text are the most expensive, so they run
    on the first pairs only.
    """
    states = matcher.encode_image_queries(batch.image_features)
    image_embeds = matcher.image_embeds(states.query_output)  # [B, Q, E]
    text_embeds = matcher.text_embeds(batch.input_ids, batch.attention_mask)  # [B, E]
    similarities = matcher.itc_scores(image_embeds, text_embeds) / matcher.temperature  # [B, B]
    losses = {
        "loss_itc": itc_loss(similarities, batch.matches),
        "loss_itm": _matching_loss(matcher, batch, similarities, num_pairs),
        "loss_itg": _generation_loss(matcher, batch, states.keys_values, num_pairs),
    }
    return {"loss": torch.stack(list(losses.values())).sum(), **losses}


def _matching_loss(matcher: Matcher, batch: PairBatch, similarities: Tensor, num_pairs: int) -> Tensor:
    """Compute ITM over the first pairs and a hard negative of both kinds, sampled from the whole batch."""
    hard_negatives = sample_hard_negatives(similarities, batch.matches)
    negative_text, negative_image = (indices[:num_pairs] for indices in hard_negatives)
    images, ids, mask = batch.image_features, batch.input_ids, batch.attention_mask
    positive = torch.arange(len(negative_text), device=images.device)
    image_index = torch.cat([positive, negative_image, positive])
    text_index = torch.cat([positive, positive, negative_text])
    logits = matcher.match_logits(images[image_index], ids[text_index], mask[text_index])  # [3 num_pairs, 2]
    return itm_loss(logits, len(positive))


def _generation_loss(
    matcher: Matcher, batch: PairBatch, keys_values: Sequence[KeysValues], num_pairs: int
) -> Tensor:
    """Compute ITG over the first pairs, with the query keys and values cached by the ITC pass."""
    decoder_ids, mask = batch.input_ids[:num_pairs].clone(), batch.attention_mask[:num_pairs]
    decoder_ids[:, 0] = matcher.tokenizer.bos_token_id  # [DEC] replaces [CLS]
    cached = [(keys[:num_pairs], values[:num_pairs]) for keys, values in keys_values]
    return itg_loss(matcher.generation_logits(decoder_ids, mask, cached), itg_labels(decoder_ids, mask))
