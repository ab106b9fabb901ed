"""The losses of stage 1 as LAVIS computes them: four passes with nothing shared, written out in torch.

Similarities of all pairs, the best query of each, targets on the diagonal, three batches for matching, and
generation by one joint pass under an explicit mask.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from model.matching import Matcher
from training.data.batches import PairBatch


def contrastive_loss(matcher: Matcher, batch: PairBatch) -> Tensor:
    size = len(batch.input_ids)
    queries = matcher.encode_image_queries(batch.image_features).query_output
    image = F.normalize(matcher.vision_projection(queries), dim=-1)  # [B, Q, E]
    embeds = matcher.embeddings(batch.input_ids)
    text_states = matcher.qformer.encode_texts(embeds, batch.attention_mask)
    text = F.normalize(matcher.text_projection(text_states[:, 0]), dim=-1)  # [B, E]
    query_to_text = torch.matmul(image.unsqueeze(1), text[None, :, :, None]).squeeze(-1)  # [B, B, Q]
    image_to_text = query_to_text.max(-1).values / matcher.temperature
    text_to_query = torch.matmul(text[:, None, None, :], image.transpose(1, 2)[None]).squeeze(-2)
    text_to_image = text_to_query.max(-1).values / matcher.temperature
    own = torch.arange(size)
    both = [F.cross_entropy(each, own, label_smoothing=0.1) for each in (image_to_text, text_to_image)]
    return (both[0] + both[1]) / 2


def matching_loss(
    matcher: Matcher, batch: PairBatch, negative_text: Tensor, negative_image: Tensor
) -> Tensor:
    images, ids, mask = batch.image_features, batch.input_ids, batch.attention_mask
    size = len(ids)
    all_images = torch.cat([images, images[negative_image], images])
    all_ids = torch.cat([ids, ids, ids[negative_text]])
    all_masks = torch.cat([mask, mask, mask[negative_text]])
    query_tokens = matcher.query_tokens.expand(3 * size, -1, -1)
    states = matcher.qformer.encode_pairs(
        query_tokens, matcher.embeddings(all_ids), all_masks, matcher.ln_vision(all_images)
    )
    logits = matcher.itm_head(states[:, : query_tokens.shape[1]]).mean(dim=1)
    labels = torch.cat([torch.ones(size), torch.zeros(2 * size)]).long()
    return F.cross_entropy(logits, labels)


def generation_loss(matcher: Matcher, batch: PairBatch) -> Tensor:
    """Compute ITG by one joint pass of queries and text: queries never see text, text sees what is before."""
    assert matcher.text_head is not None
    ids, mask = batch.input_ids.clone(), batch.attention_mask
    ids[:, 0] = matcher.tokenizer.bos_token_id
    labels = ids.masked_fill(mask == 0, -100)
    states = joint_states(matcher, ids, mask, batch.image_features)
    logits = matcher.text_head(states)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1)


def joint_states(matcher: Matcher, ids: Tensor, mask: Tensor, image_features: Tensor) -> Tensor:
    """Compute the [B, T, D] states of texts in one joint pass under the explicit mask of UniLM."""
    qformer, (size, length) = matcher.qformer, ids.shape
    query_tokens = matcher.query_tokens.expand(size, -1, -1)
    num_queries = query_tokens.shape[1]
    visible = torch.zeros(size, 1, num_queries + length, num_queries + length, dtype=torch.bool)
    visible[..., :num_queries] = True
    visible[..., num_queries:, num_queries:] = torch.ones(length, length).tril().bool()
    visible[..., num_queries:] &= mask.bool()[:, None, None, :]
    normed = matcher.ln_vision(image_features)
    states: Tensor = qformer.dropout(
        qformer.layernorm(torch.cat([query_tokens, matcher.embeddings(ids)], dim=1))
    )
    for layer in qformer.layers:
        attended = layer.attend(states, layer.keys_values(states), visible)
        queries = layer.finish_queries(attended[:, :num_queries], layer.image_keys_values(normed))
        states = torch.cat([queries, layer.finish_texts(attended[:, num_queries:])], dim=1)
    return states[:, num_queries:]
