"""Stage 1: vision-language representation learning with a frozen image encoder (BLIP-2, §3.2).

ITC, ITM with hard negatives and ITG are summed 1:1:1. Each step passes through the Q-Former four times:
queries over B images, B texts, matched and mismatched pairs, and texts over the cached queries. The keys and
values of an image are computed once for all of them.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from model.config import QFormerConfig
from model.matching import Matcher
from model.qformer import ImageKeysValues, KeysValues, copy_text_ffn_to_query_ffn, select_images
from training.config import QFormerShape, Stage1Config
from training.data.batches import PairBatch, PairSampler
from training.diagnostics import itm_accuracy, itm_prior_loss, query_cosine
from training.loop import Losses, Run, train
from training.losses import IGNORED, itc_loss, itg_labels, itg_loss, itm_loss, sample_hard_negatives


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
    on the first pairs only. All share the keys and values of the images; ITG shares ITC's query pass.
    Besides the losses, the figures of `diagnostics`, without gradient: `itm_accuracy`, `itm_margin` (how far
    `loss_itm` is below that of its prior, in nats), `query_cosine` and `temperature`.
    """
    images = matcher.project_images(batch.image_features)
    states = matcher.encode_image_queries(images)
    image_embeds = matcher.image_embeds(states.query_output)  # [B, Q, E]
    text_embeds = matcher.text_embeds(batch.input_ids, batch.attention_mask)  # [B, E]
    similarities = matcher.itc_scores(image_embeds, text_embeds) / matcher.temperature  # [B, B]
    logits, num_positives = _match_hard_pairs(matcher, batch, images, similarities, num_pairs)
    losses = {
        "loss_itc": itc_loss(similarities, batch.matches),
        "loss_itm": itm_loss(logits, num_positives),
        "loss_itg": _generation_loss(matcher, batch, states.keys_values, num_pairs),
    }
    figures = {
        "itm_accuracy": itm_accuracy(logits, num_positives),
        "itm_margin": itm_prior_loss(num_positives, len(logits)) - losses["loss_itm"].detach(),
        "query_cosine": query_cosine(states.query_output),
        "temperature": matcher.temperature.detach(),
    }
    return {"loss": torch.stack(list(losses.values())).sum(), **losses, **figures}


def _match_hard_pairs(
    matcher: Matcher, batch: PairBatch, images: ImageKeysValues, similarities: Tensor, num_pairs: int
) -> tuple[Tensor, int]:
    """Compute the matching logits of the first pairs and of a hard negative of both kinds for each.

    Negatives are sampled from the whole batch; a batch of one has none. Returns the logits, [3 num_pairs, 2],
    and the number of matched pairs, which come first.
    """
    hard_negatives = sample_hard_negatives(similarities, batch.matches)
    negative_text, negative_image = (indices[:num_pairs] for indices in hard_negatives)
    positive = torch.arange(min(num_pairs, len(similarities)), device=similarities.device)
    image_index = torch.cat([positive, negative_image, positive[: len(negative_text)]])
    text_index = torch.cat([positive, positive[: len(negative_image)], negative_text])
    chosen = select_images(images, image_index)
    ids, mask = batch.input_ids[text_index], batch.attention_mask[text_index]
    return matcher.match_logits(chosen, ids, mask), len(positive)


def _generation_loss(
    matcher: Matcher, batch: PairBatch, keys_values: Sequence[KeysValues], num_pairs: int
) -> Tensor:
    """Compute ITG over the first pairs, with the query keys and values cached by the ITC pass."""
    decoder_ids, mask = batch.input_ids[:num_pairs].clone(), batch.attention_mask[:num_pairs]
    decoder_ids[:, 0] = matcher.tokenizer.bos_token_id  # [DEC] replaces [CLS]
    cached = [(keys[:num_pairs], values[:num_pairs]) for keys, values in keys_values]
    labels = itg_labels(decoder_ids, mask)
    is_target = labels != IGNORED
    return itg_loss(matcher.target_logits(decoder_ids, mask, cached, is_target), labels[is_target])
