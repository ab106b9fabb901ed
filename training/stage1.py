"""Stage 1: the Q-Former learns to represent what a text says of an image (BLIP-2, §3.2).

Image encoder frozen; ITC, ITM with hard negatives and ITG are summed 1:1:1. For each step the Q-Former makes
four passes: queries over B images, B texts, the matched and mismatched pairs, and texts over the cached
queries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.config import QFormerConfig
from model.matching import Matcher
from model.qformer import KeysValues, copy_text_ffn_to_query_ffn
from training.captions import listing_caption, sample_caption, sample_text
from training.config import Stage1, TinyConfig
from training.features import ImageFeatures
from training.loop import Losses, Run, train
from training.losses import itc_loss, itg_labels, itg_loss, itm_loss, sample_hard_negatives
from training.scenes import Scene
from training.truth import is_true_caption, named_pairs
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


@dataclass(frozen=True, slots=True)
class PairBatch:
    """B images with their texts.

    `image_features` [B, P, V]; `input_ids` and `attention_mask` [B, T]; `matches` [B, B] as in `losses`.
    """

    image_features: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    matches: Tensor

    def to(self, device: torch.device) -> "PairBatch":
        return PairBatch(*(getattr(self, name).to(device) for name in self.__slots__))


def stage1_losses(matcher: Matcher, batch: PairBatch, num_pairs: int) -> Losses:
    """The three losses and their sum: ITC over the whole batch, ITM and ITG over its first `num_pairs`.

    ITC learns from what else is in the batch, so the batch is large; the passes that join image and text
    cost most and take a part of it.
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
    """ITM over the first pairs, each beside a hard negative of both kinds from the whole batch."""
    negatives = sample_hard_negatives(similarities, batch.matches)
    wrong_text, wrong_image = (chosen[:num_pairs] for chosen in negatives)
    images, ids, mask = batch.image_features, batch.input_ids, batch.attention_mask
    own = torch.arange(len(wrong_text), device=images.device)
    logits = matcher.match_logits(
        images[torch.cat([own, wrong_image, own])],
        ids[torch.cat([own, own, wrong_text])],
        mask[torch.cat([own, own, wrong_text])],
    )  # [3 num_pairs, 2]
    return itm_loss(logits, len(own))


def _generation_loss(
    matcher: Matcher, batch: PairBatch, keys_values: Sequence[KeysValues], num_pairs: int
) -> Tensor:
    """ITG over the first pairs, from the keys and values that ITC's pass over the queries left."""
    generated, mask = batch.input_ids[:num_pairs].clone(), batch.attention_mask[:num_pairs]
    generated[:, 0] = matcher.tokenizer.bos_token_id  # [DEC] in the place of [CLS]
    cached = [(keys[:num_pairs], values[:num_pairs]) for keys, values in keys_values]
    return itg_loss(matcher.generation_logits(generated, mask, cached), itg_labels(generated, mask))


def true_matches(scenes: Sequence[Scene], captions: Sequence[str]) -> Tensor:
    """Which caption is true of which scene, [B, B]: scenes can share a short caption."""
    named = [set(named_pairs(caption)) for caption in captions]
    present = [{(item.color, item.shape) for item in scene.objects} for scene in scenes]
    truth = [
        [names <= there and is_true_caption(text, scene) for names, text in zip(named, captions, strict=True)]
        for there, scene in zip(present, scenes, strict=True)
    ]
    return torch.tensor(truth)


def train_matcher(
    run: Run,
    matcher: Matcher,
    scenes: Sequence[Scene],
    features: ImageFeatures,
    plan: Stage1,
    sample: Callable[[Scene, np.random.Generator], str],
) -> Matcher:
    """Trains a stage-1 model in place on features of the frozen encoder, with texts that `sample` draws.

    Resumes where a former run stopped.
    """
    matcher.to(run.device).train().requires_grad_(True)

    def step(rng: np.random.Generator) -> Losses:
        chosen = rng.choice(len(scenes), size=plan.optimization.batch_size, replace=False)
        drawn = [scenes[int(i)] for i in chosen]
        texts = [sample(scene, rng) for scene in drawn]
        input_ids, attention_mask = matcher.tokenize(texts)
        batch = PairBatch(features.load(chosen), input_ids, attention_mask, true_matches(drawn, texts))
        return stage1_losses(matcher, batch.to(run.device), plan.num_pairs)

    train(run, matcher, step, plan.optimization)
    return matcher.eval()


def train_stage1(run: Run, config: TinyConfig, scenes: Sequence[Scene], features: ImageFeatures) -> Matcher:
    """Stage 1 from a fresh Q-Former, on texts of every style."""
    torch.manual_seed(config.seed)
    return train_matcher(run, build_matcher(config), scenes, features, config.stage1, sample_text)


def finetune_retrieval(
    run: Run, config: TinyConfig, scenes: Sequence[Scene], features: ImageFeatures, matcher: Matcher
) -> Matcher:
    """Goes on with a stage-1 model in larger batches, mostly on captions that name everything.

    The paper (section 4.4) also trains the image encoder here; it stays frozen, so that one encoder serves
    both stages.
    """
    return train_matcher(run, matcher, scenes, features, config.retrieval, _sample_query)


def _sample_query(scene: Scene, rng: np.random.Generator) -> str:
    return listing_caption(scene) if rng.random() < 0.5 else sample_caption(scene, rng)
