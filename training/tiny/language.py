"""Unimodal pre-training of the small decoder-only language model (OPT) on texts of the synthetic world.

Each sequence is a dense description, then a caption, the description again, and questions with answers. The
description has as many words as the Q-Former has query tokens: in stage 2 the soft prompt takes its place.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from model.language import LanguageModel
from training.data.packing import WeightedText, pack_texts, text_starts
from training.loop import Losses, Run, train
from training.stages.packed_decoding import lm_loss, run_packed
from training.stages.turn_tokenizer import TurnTokenizer
from training.tiny.attention_supervision import (
    LOSS_WEIGHT,
    AttentionProbes,
    TextSpan,
    find_attention_targets,
)
from training.tiny.config import LanguageShape, TinyConfig
from training.world.captions import GRID, dense_description
from training.world.qa_turns import sample_qa_turns
from training.world.scenes import Scene

_PROMPT_WEIGHT = 0.05  # loss weight of prompt tokens: mostly context, the answers are the target


def build_language_model(shape: LanguageShape, tokenizer: PreTrainedTokenizerFast) -> OPTForCausalLM:
    """Build an untrained OPT without dropout; linear weights N(0, 1/fan_in), which small widths need."""
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        word_embed_proj_dim=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        ffn_dim=shape.intermediate_size,
        max_position_embeddings=shape.max_position_embeddings,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # several times faster than fused attention at these sizes on a CPU
    )
    model = OPTForCausalLM(config)
    depth = (2 * shape.num_hidden_layers) ** 0.5
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            ends_a_branch = name.endswith(("out_proj", "fc2"))
            nn.init.normal_(module.weight, std=module.in_features**-0.5 / (depth if ends_a_branch else 1.0))
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)
    order_cells(model.get_input_embeddings().weight, tokenizer)
    return model


@torch.no_grad()
def order_cells(embeddings: Tensor, tokenizer: PreTrainedTokenizerFast) -> None:
    """Shift the cell words of each axis along one random direction of the embeddings [N, L], in order."""
    ramp = torch.linspace(-1, 1, GRID)[:, None]
    for axis in "xy":
        ids = tokenizer.convert_tokens_to_ids([f"{axis}{cell}" for cell in range(GRID)])
        embeddings[ids] += ramp * torch.randn(embeddings.shape[1]) * embeddings.std()


def pretrain_language_model(
    run: Run, config: TinyConfig, scenes: Sequence[Scene], tokenizer: PreTrainedTokenizerFast
) -> OPTForCausalLM:
    """Train the language model on dense descriptions and QA turns; resumes from its last checkpoint."""
    torch.manual_seed(config.seed)
    llm = build_language_model(config.language_model, tokenizer).to(run.device)
    probes = AttentionProbes(config.language_model.hidden_size).to(run.device)
    length, optimization = config.qformer.num_query_tokens, config.language_pretraining
    turn_tokenizer = TurnTokenizer(LanguageModel(llm, tokenizer))
    max_tokens = config.language_model.max_position_embeddings - length

    def step(_: int, rng: np.random.Generator) -> Losses:
        batch_scenes = [scenes[int(i)] for i in rng.integers(len(scenes), size=optimization.batch_size)]
        qa_turns = [sample_qa_turns(scene, rng, config.num_questions) for scene in batch_scenes]
        texts = [
            [
                turn_tokenizer.continue_prompt(turn, max_tokens=max_tokens, prompt_weight=_PROMPT_WEIGHT)
                for turn in turns
            ]
            for turns in qa_turns
        ]
        batch = pack_texts(texts, length, tokenizer.pad_token_id).to(run.device)
        prefix = embed_descriptions(llm, tokenizer, batch_scenes, length)
        output = run_packed(llm, prefix, batch, output_hidden_states=True, output_attentions=True)
        loss_lm = lm_loss(output.logits, batch)
        targets = find_attention_targets(_text_spans(texts, length, tokenizer), batch_scenes).to(run.device)
        attention_losses = probes.losses(output.hidden_states[1:], output.attentions, targets)
        loss = loss_lm + LOSS_WEIGHT * torch.stack(list(attention_losses.values())).sum()
        return {"loss": loss, "loss_lm": loss_lm, **attention_losses}

    train(run, nn.ModuleDict({"llm": llm, "heads": probes}), step, optimization)
    return llm.eval()


def embed_descriptions(
    llm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, scenes: Sequence[Scene], length: int
) -> Tensor:
    """Embed dense descriptions of `length` words into [B, Q, L]: the content of an ideal soft prompt."""
    descriptions = [dense_description(scene, length) for scene in scenes]
    ids = tokenizer(descriptions, add_special_tokens=False, return_tensors="pt").input_ids
    embeddings: Tensor = llm.get_input_embeddings()(ids.to(llm.device))
    return embeddings


def _text_spans(
    texts: Sequence[Sequence[WeightedText]], prefix_length: int, tokenizer: PreTrainedTokenizerFast
) -> list[list[TextSpan]]:
    return [
        [
            TextSpan(tokenizer.convert_ids_to_tokens(text.token_ids), start, len(text.token_ids))
            for text, start in zip(row, text_starts(row, prefix_length), strict=True)
        ]
        for row in texts
    ]
