"""Stage 1: the Q-Former learns to represent what a text says of an image (BLIP-2, §3.2).

Image encoder frozen; ITC, ITM with hard negatives and ITG are summed 1:1:1. For each step the Q-Former makes
four passes: queries over B images, B texts, 3B pairs, and B texts over the cached queries.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.config import QFormerConfig
from model.matching import Matcher
from model.qformer import copy_text_ffn_to_query_ffn
from training.config import TinyConfig
from training.features import ImageFeatures
from training.loop import Losses, Run, train
from training.losses import itc_loss, itg_labels, itg_loss, itm_loss, sample_hard_negatives
from training.scene_text import is_true_caption, sample_caption
from training.scenes import Scene
from training.vocabulary import build_text_tokenizer


def build_matcher(config: TinyConfig) -> Matcher:
    """An untrained stage-1 model; the query FFNs begin as copies of the text FFNs."""
    shape, tokenizer = config.qformer, build_text_tokenizer()
    qformer_config = QFormerConfig(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        intermediate_size=shape.intermediate_size,
        encoder_hidden_size=config.vision_model.hidden_size,
        num_query_tokens=shape.num_query_tokens,
        vocab_size=len(tokenizer),
        max_position_embeddings=shape.max_text_tokens,
        joint_size=shape.joint_size,
        cross_attention_frequency=shape.cross_attention_frequency,
        hidden_dropout_prob=shape.dropout,
        attention_probs_dropout_prob=shape.dropout,
    )
    matcher = Matcher(qformer_config, tokenizer, max_text_tokens=shape.max_text_tokens)
    copy_text_ffn_to_query_ffn(matcher.qformer)
    return matcher


def stage1_losses(
    matcher: Matcher, image_features: Tensor, input_ids: Tensor, attention_mask: Tensor, matches: Tensor
) -> Losses:
    """The three losses and their sum for B images [B, P, V] and texts [B, T]; `matches` as in `losses`."""
    states = matcher.encode_image_queries(image_features)
    similarities = contrast(matcher, states.query_output, input_ids, attention_mask)
    loss_itc = itc_loss(similarities, matches)
    loss_itm = matching_loss(matcher, image_features, input_ids, attention_mask, similarities, matches)

    generated = input_ids.clone()
    generated[:, 0] = matcher.tokenizer.bos_token_id  # [DEC] in the place of [CLS]
    logits = matcher.generation_logits(generated, attention_mask, states.keys_values)
    loss_itg = itg_loss(logits, itg_labels(generated, attention_mask))

    loss = loss_itc + loss_itm + loss_itg
    return {"loss": loss, "loss_itc": loss_itc, "loss_itm": loss_itm, "loss_itg": loss_itg}


def contrast(matcher: Matcher, query_output: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The [B, B] similarities of images (query outputs [B, Q, D]) and texts [B, T], over the temperature."""
    image_embeds = matcher.image_embeds(query_output)  # [B, Q, E]
    text_embeds = matcher.text_embeds(input_ids, attention_mask)  # [B, E]
    return matcher.itc_scores(image_embeds, text_embeds) / matcher.temperature


def matching_loss(
    matcher: Matcher,
    image_features: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    similarities: Tensor,
    matches: Tensor,
    num_pairs: int | None = None,
) -> Tensor:
    """ITM over the first `num_pairs` pairs (None: all), with hard negatives from the whole batch."""
    wrong_text, wrong_image = (chosen[:num_pairs] for chosen in sample_hard_negatives(similarities, matches))
    images, ids, mask = image_features[:num_pairs], input_ids[:num_pairs], attention_mask[:num_pairs]
    logits = matcher.match_logits(
        torch.cat([images, image_features[wrong_image], images]),
        torch.cat([ids, ids, input_ids[wrong_text]]),
        torch.cat([mask, mask, attention_mask[wrong_text]]),
    )  # [3B, 2]
    return itm_loss(logits, len(images))


def true_matches(scenes: Sequence[Scene], captions: Sequence[str]) -> Tensor:
    """Which caption is true of which scene, [B, B]: scenes can share a short caption."""
    truth = [[is_true_caption(caption, scene) for caption in captions] for scene in scenes]
    return torch.tensor(truth)


def train_stage1(run: Run, config: TinyConfig, scenes: Sequence[Scene], features: ImageFeatures) -> Matcher:
    """Trains the stage-1 model on features of the frozen encoder; resumes where a former run stopped."""
    torch.manual_seed(config.seed)
    matcher = build_matcher(config).to(run.device).train()

    def step(rng: np.random.Generator) -> Losses:
        chosen = rng.choice(len(scenes), size=config.stage1.batch_size, replace=False)
        batch = [scenes[int(i)] for i in chosen]
        captions = [sample_caption(scene, rng) for scene in batch]
        input_ids, attention_mask = (tensor.to(run.device) for tensor in matcher.tokenize(captions))
        matches = true_matches(batch, captions).to(run.device)
        return stage1_losses(
            matcher, features.load(chosen).to(run.device), input_ids, attention_mask, matches
        )

    train(run, matcher, step, config.stage1)
    return matcher.eval()
