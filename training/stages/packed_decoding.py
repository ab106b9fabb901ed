"""Texts behind soft prompts through a decoder-only language model: packed, or one text a row.

Most models of `transformers` take an attention mask of four dimensions and positions of the caller's, so all
texts of an image are one row. Others (ALiBi, state spaces, some attention kernels) ignore or refuse them.
`can_pack` finds out by computing both ways.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from training.data.packing import PackedBatch, WeightedText, pack_texts, packed_attention_mask


def run_packed(
    llm: PreTrainedModel, prefix: Tensor, batch: PackedBatch, **outputs: bool
) -> CausalLMOutputWithPast:
    """Run a model over a prefix [B, Q, L] and packed texts; `outputs` selects optional outputs.

    The logits [B, C, N] are those of `batch.kept_columns`.
    """
    batch_size, prefix_length = prefix.shape[:2]
    embeds = _embed(llm, prefix, batch)
    # an fp32 mask would widen every bf16 attention score
    mask_dtype = (
        torch.get_autocast_dtype(prefix.device.type)
        if torch.is_autocast_enabled(prefix.device.type)
        else embeds.dtype
    )
    prefix_positions = torch.arange(prefix_length, device=prefix.device).expand(batch_size, -1)
    return llm(
        inputs_embeds=embeds,
        attention_mask=packed_attention_mask(batch.segments, prefix_length, mask_dtype),
        position_ids=torch.cat([prefix_positions, batch.position_ids], dim=1),
        logits_to_keep=batch.kept_columns,
        use_cache=False,
        **outputs,
    )


def run_alone(llm: PreTrainedModel, prefix: Tensor, batch: PackedBatch) -> CausalLMOutputWithPast:
    """Run a model over a prefix [B, Q, L] with one text in each row.

    Padding is on the right, where a causal model never sees it, so neither mask nor positions are passed.
    """
    embeds = _embed(llm, prefix, batch)
    return llm(inputs_embeds=embeds, logits_to_keep=batch.kept_columns, use_cache=False)


def lm_loss(logits: Tensor, batch: PackedBatch) -> Tensor:
    """Compute the weighted mean cross-entropy of the targets of packed texts from their logits [B, C, N]."""
    losses = F.cross_entropy(_target_logits(logits, batch), batch.labels, reduction="none")
    return (losses * batch.weights).sum() / batch.weights.sum()


@torch.no_grad()
def can_pack(llm: PreTrainedModel) -> bool:
    """Return whether a model computes two packed texts as it computes each alone.

    Tried on a few tokens: the packed logits must be ten times nearer to those of each text alone than the
    logits of the second text behind the first are, or equal but for rounding.
    """
    embeddings = llm.get_input_embeddings().weight
    ids = torch.linspace(0, len(embeddings) - 1, 8).long().tolist()
    prefix = embeddings[ids[:2]][None]
    texts = [WeightedText(tuple(part), (0.0, 1.0, 1.0)) for part in (ids[2:5], ids[5:8])]
    both, second = (
        pack_texts([row], 2, pad_token_id=ids[0]).to(embeddings.device) for row in (texts, texts[1:])
    )
    expected = _target_logits(run_alone(llm, prefix, second).logits, second)
    behind = _target_logits(run_alone(llm, prefix, both).logits, both)[-len(expected) :]
    try:
        found = _target_logits(run_packed(llm, prefix, both).logits, both)[-len(expected) :]
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):  # refuses such a mask
        return False
    difference, effect = ((each - expected).abs().max() for each in (found, behind))
    return bool(difference <= torch.maximum(0.1 * effect, 1e-5 * expected.abs().max()))


def _embed(llm: PreTrainedModel, prefix: Tensor, batch: PackedBatch) -> Tensor:
    embeds = llm.get_input_embeddings()(batch.input_ids)
    return torch.cat([prefix.to(embeds.dtype), embeds], dim=1)  # [B, Q + T, L]


def _target_logits(logits: Tensor, batch: PackedBatch) -> Tensor:
    if logits.shape[1] != len(batch.kept_columns):  # a model that returns those of all positions
        logits = logits[:, batch.kept_columns]
    return logits[batch.target_rows, batch.target_columns].float()  # [K, N]
