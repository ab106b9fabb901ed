"""Unimodal pre-training of the small language model (OPT) on texts of the synthetic world.

The corpus is text only: a dense description of a scene, and behind it a caption, the description once more,
and questions with answers. The description has exactly as many words as the Q-Former has query tokens, so
that in stage 2 the soft visual prompt takes its place.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPast

from training.config import LanguageShape, TinyConfig
from training.data.packing import PackedTexts, Text, pack_texts, packed_mask, text_starts
from training.loop import Losses, Run, train
from training.tiny.attention_supervision import ReadingHeads, ReadText, find_mentions
from training.world.captions import GRID, dense_description
from training.world.qa_turns import Exchange, sample_exchanges
from training.world.scenes import Scene

_PROMPT_WEIGHT = 0.05  # the words of a prompt are context; what answers it is what is asked for
READING_WEIGHT = 0.3


def build_language_model(shape: LanguageShape, tokenizer: PreTrainedTokenizerFast) -> OPTForCausalLM:
    """An untrained OPT without dropout; linear weights N(0, 1/fan_in), which small widths need to learn."""
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
    """Lays the cells of each axis along a random direction of the embeddings [N, L], in their order."""
    ramp = torch.linspace(-1, 1, GRID)[:, None]
    for axis in "xy":
        ids = tokenizer.convert_tokens_to_ids([f"{axis}{cell}" for cell in range(GRID)])
        embeddings[ids] += ramp * torch.randn(embeddings.shape[1]) * embeddings.std()


def to_text(exchange: Exchange, tokenizer: PreTrainedTokenizerFast, prompt_weight: float = 0.0) -> Text:
    """An exchange as one begun and ended text; the answer and the end are targets, the prompt weakly.

    The first word of a prompt never is: what follows the begin token unprompted is a caption.
    """
    prompt = tokenizer(exchange.prompt).input_ids
    answer = [*tokenizer(exchange.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    prompt_weights = [0.0, 0.0, *[prompt_weight] * len(prompt)][: len(prompt)]
    return Text((*prompt, *answer), (*prompt_weights, *[exchange.weight] * len(answer)))


def run_packed(
    llm: OPTForCausalLM, prefix: Tensor, packed: PackedTexts, **outputs: bool
) -> BaseModelOutputWithPast:
    """Runs the decoder over a prefix [B, Q, L] and the packed texts; `outputs` asks for more of it."""
    batch, prefix_length = prefix.shape[:2]
    # an fp32 mask would widen every bf16 attention score
    mask_dtype = (
        torch.get_autocast_dtype(prefix.device.type)
        if torch.is_autocast_enabled(prefix.device.type)
        else prefix.dtype
    )
    prefix_positions = torch.arange(prefix_length, device=prefix.device).expand(batch, -1)
    return llm.model(
        inputs_embeds=torch.cat([prefix, llm.get_input_embeddings()(packed.input_ids)], dim=1),
        attention_mask=packed_mask(packed.segments, prefix_length, mask_dtype),
        position_ids=torch.cat([prefix_positions, packed.position_ids], dim=1),
        use_cache=False,
        **outputs,
    )


def packed_lm_loss(llm: OPTForCausalLM, last_hidden_state: Tensor, packed: PackedTexts) -> Tensor:
    """Weighted mean cross-entropy of the packed texts, from the states [B, Q+T, L] of prefix and texts."""
    targets = packed.weights > 0
    hidden = last_hidden_state[:, -packed.input_ids.shape[1] :]  # [B, T, L]
    logits = llm.lm_head(hidden[targets]).float()  # [targets, N]
    losses = F.cross_entropy(logits, packed.labels[targets], reduction="none")
    weights = packed.weights[targets]
    return (losses * weights).sum() / weights.sum()


@dataclass(frozen=True, slots=True)
class OptReader:
    """OPT behind soft prompts: all exchanges about one image are packed behind its prompt."""

    llm: OPTForCausalLM
    tokenizer: PreTrainedTokenizerFast

    def loss(self, prefix: Tensor, exchanges: Sequence[Sequence[Exchange]]) -> Tensor:
        """The mean loss of the answers' words, of each image's exchanges behind its prefix [B, Q, L]."""
        texts = [[to_text(item, self.tokenizer) for item in row] for row in exchanges]
        packed = pack_texts(texts, prefix.shape[1], self.tokenizer.pad_token_id).to(prefix.device)
        return packed_lm_loss(self.llm, run_packed(self.llm, prefix, packed).last_hidden_state, packed)


def pretrain_language_model(
    run: Run, config: TinyConfig, scenes: Sequence[Scene], tokenizer: PreTrainedTokenizerFast
) -> OPTForCausalLM:
    """Trains the language model to read dense descriptions; resumes where a former run stopped."""
    torch.manual_seed(config.seed)
    llm = build_language_model(config.language_model, tokenizer).to(run.device)
    heads = ReadingHeads(config.language_model.hidden_size).to(run.device)
    length = config.qformer.num_query_tokens

    def step(rng: np.random.Generator) -> Losses:
        chosen = [
            scenes[int(i)] for i in rng.integers(len(scenes), size=config.language_pretraining.batch_size)
        ]
        exchanges = [sample_exchanges(scene, rng, config.num_questions) for scene in chosen]
        texts = [[to_text(item, tokenizer, _PROMPT_WEIGHT) for item in row] for row in exchanges]
        packed = pack_texts(texts, length, tokenizer.pad_token_id).to(run.device)
        prefix = embed_descriptions(llm, tokenizer, chosen, length)
        output = run_packed(llm, prefix, packed, output_hidden_states=True, output_attentions=True)
        loss_lm = packed_lm_loss(llm, output.last_hidden_state, packed)
        mentions = find_mentions(_read_texts(texts, length, tokenizer), chosen).to(run.device)
        reading = heads.losses(output.hidden_states[1:], output.attentions, mentions)
        loss = loss_lm + READING_WEIGHT * torch.stack(list(reading.values())).sum()
        return {"loss": loss, "loss_lm": loss_lm, **reading}

    train(run, nn.ModuleDict({"llm": llm, "heads": heads}), step, config.language_pretraining)
    return llm.eval()


def embed_descriptions(
    llm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, scenes: Sequence[Scene], length: int
) -> Tensor:
    """The word embeddings [B, Q, L] of dense descriptions: what a perfect soft prompt would say."""
    descriptions = [dense_description(scene, length) for scene in scenes]
    ids = tokenizer(descriptions, add_special_tokens=False, return_tensors="pt").input_ids
    embeddings: Tensor = llm.get_input_embeddings()(ids.to(llm.device))
    return embeddings


def _read_texts(
    texts: Sequence[Sequence[Text]], prefix_length: int, tokenizer: PreTrainedTokenizerFast
) -> list[list[ReadText]]:
    return [
        [
            ReadText(tokenizer.convert_ids_to_tokens(text.token_ids), start, len(text.token_ids))
            for text, start in zip(row, text_starts(row, prefix_length), strict=True)
        ]
        for row in texts
    ]
