"""Unimodal pre-training of the small encoder-decoder language model (T5) on texts of the synthetic world.

The encoder encodes a dense description (in stage 2: the soft prompt) and a prompt, the decoder decodes the
answer.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from model.language import LanguageModel
from training.data.batches import QaTurn
from training.loop import Losses, Run, train
from training.stages.encoder_decoder import (
    encode_turns,
    group_by_length,
    mean_loss,
    run_encoder_decoder,
    split_captions,
    weighted_loss,
)
from training.stages.stage2 import MAX_TEXT_TOKENS
from training.stages.turn_tokenizer import TurnTokenizer
from training.tiny.attention_supervision import (
    LOSS_WEIGHT,
    AttentionProbes,
    TextSpan,
    find_attention_targets,
)
from training.tiny.config import EncoderDecoderShape, TinyConfig
from training.tiny.language import embed_descriptions, order_cells
from training.world.qa_turns import sample_qa_turns
from training.world.scenes import Scene


def build_encoder_decoder(
    shape: EncoderDecoderShape, tokenizer: PreTrainedTokenizerFast
) -> T5ForConditionalGeneration:
    """Build an untrained T5 without dropout, as Flan-T5 is: gated GELU, untied output head."""
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
    for stack in (model.encoder, model.decoder):  # relative distances have an effect from the first step on
        nn.init.normal_(stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight, std=2.0)
    order_cells(model.get_input_embeddings().weight, tokenizer)
    return model


def pretrain_encoder_decoder(
    run: Run, config: TinyConfig, scenes: Sequence[Scene], tokenizer: PreTrainedTokenizerFast
) -> T5ForConditionalGeneration:
    """Train T5 on dense descriptions and QA turns; resumes from its last checkpoint."""
    torch.manual_seed(config.seed)
    llm = build_encoder_decoder(config.language_model_t5, tokenizer).to(run.device)
    probes = AttentionProbes(config.language_model_t5.hidden_size).to(run.device)
    length, optimization = config.qformer.num_query_tokens, config.language_pretraining_t5
    language_model = LanguageModel(llm, tokenizer)
    turn_tokenizer = TurnTokenizer(language_model)

    def step(_: int, rng: np.random.Generator) -> Losses:
        batch_scenes = [scenes[int(i)] for i in rng.integers(len(scenes), size=optimization.batch_size)]
        qa_turns = [sample_qa_turns(scene, rng, config.num_questions) for scene in batch_scenes]
        prefix = embed_descriptions(llm, tokenizer, batch_scenes, length)
        sums, attention_losses = [], {}
        groups = group_by_length(split_captions(qa_turns))
        for group in groups:
            encoded = encode_turns(group, language_model, turn_tokenizer, max_text_tokens=MAX_TEXT_TOKENS).to(
                run.device
            )
            output = run_encoder_decoder(
                llm, prefix, encoded, output_hidden_states=True, output_attentions=True
            )
            sums.append(weighted_loss(output.logits, encoded))
            if group is groups[-1]:  # short answers: the questions
                spans, turn_scenes = _prompt_spans(group, length), [batch_scenes[image] for image, _ in group]
                targets = find_attention_targets(spans, turn_scenes).to(run.device)
                states, attentions = output.encoder_hidden_states[1:], output.encoder_attentions
                attention_losses = probes.losses(states, attentions, targets)
        loss_lm = mean_loss(sums)
        loss = loss_lm + LOSS_WEIGHT * torch.stack(list(attention_losses.values())).sum()
        return {"loss": loss, "loss_lm": loss_lm, **attention_losses}

    train(run, nn.ModuleDict({"llm": llm, "heads": probes}), step, optimization)
    return llm.eval()


def _prompt_spans(group: Sequence[tuple[int, QaTurn]], prefix_length: int) -> list[list[TextSpan]]:
    spans = []
    for _, turn in group:
        prompt = turn.prompt.lower().replace("?", " ?").replace(":", " :").split()
        spans.append([TextSpan([*prompt, *turn.answer.split()], prefix_length, len(prompt))])
    return spans
