"""Unimodal pre-training of the small language model (OPT) on texts of the synthetic world.

The corpus is text only: a dense description of a scene, and behind it captions and questions with answers
about that scene. The description has exactly as many words as the Q-Former has query tokens, so that in
stage 2 the soft visual prompt takes its place.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from training.config import LanguageShape, TinyConfig
from training.loop import Losses, Run, train
from training.packing import PackedTexts, Text, pack_texts, packed_mask
from training.scene_text import Question, dense_description, sample_caption, sample_questions
from training.scenes import Scene

QUESTION_PROMPT = "Question: {} Answer:"
_QUESTION_WEIGHT = 0.05  # the words of a question are context; its answer is what is asked for
_CAPTION_WEIGHT = 0.3


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
    return model


def caption_text(caption: str, tokenizer: PreTrainedTokenizerFast, weight: float = 1.0) -> Text:
    """A caption, begun and ended, with every token but the first a target."""
    ids = [*tokenizer(caption).input_ids, tokenizer.eos_token_id]
    return Text(tuple(ids), (0.0, *[weight] * (len(ids) - 1)))


def question_text(item: Question, tokenizer: PreTrainedTokenizerFast, question_weight: float = 0.0) -> Text:
    """A prompted question with its answer; the answer and the end are targets.

    The first word of the prompt never is: what follows the begin token unprompted is a caption.
    """
    prompt = tokenizer(QUESTION_PROMPT.format(item.question)).input_ids
    answer = [*tokenizer(item.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    weights = [0.0, 0.0, *[question_weight] * (len(prompt) - 2), *[1.0] * len(answer)]
    return Text((*prompt, *answer), tuple(weights))


def packed_lm_loss(llm: OPTForCausalLM, prefix: Tensor, packed: PackedTexts) -> Tensor:
    """Weighted mean cross-entropy of packed texts behind a prefix [B, Q, L] of embeddings."""
    batch, prefix_length = prefix.shape[:2]
    # an fp32 mask would widen every bf16 attention score
    mask_dtype = (
        torch.get_autocast_dtype(prefix.device.type)
        if torch.is_autocast_enabled(prefix.device.type)
        else prefix.dtype
    )
    prefix_positions = torch.arange(prefix_length, device=prefix.device).expand(batch, -1)
    hidden = llm.model(
        inputs_embeds=torch.cat([prefix, llm.get_input_embeddings()(packed.input_ids)], dim=1),
        attention_mask=packed_mask(packed.segments, prefix_length, mask_dtype),
        position_ids=torch.cat([prefix_positions, packed.position_ids], dim=1),
        use_cache=False,
    ).last_hidden_state[:, prefix_length:]  # [B, T, L]
    targets = packed.weights > 0
    logits = llm.lm_head(hidden[targets]).float()  # [targets, N]
    losses = F.cross_entropy(logits, packed.labels[targets], reduction="none")
    weights = packed.weights[targets]
    return (losses * weights).sum() / weights.sum()


def scene_texts(
    scene: Scene,
    rng: np.random.Generator,
    count: int,
    tokenizer: PreTrainedTokenizerFast,
    *,
    pretraining: bool,
) -> list[Text]:
    """One caption and `count - 1` questions of a scene; in pre-training questions are weak targets too."""
    caption_weight, question_weight = (_CAPTION_WEIGHT, _QUESTION_WEIGHT) if pretraining else (1.0, 0.0)
    questions = sample_questions(scene, rng, count - 1)
    return [
        caption_text(sample_caption(scene, rng), tokenizer, caption_weight),
        *[question_text(item, tokenizer, question_weight) for item in questions],
    ]


def pretrain_language_model(
    run: Run, config: TinyConfig, scenes: Sequence[Scene], tokenizer: PreTrainedTokenizerFast
) -> OPTForCausalLM:
    """Trains the language model to read dense descriptions; resumes where a former run stopped."""
    torch.manual_seed(config.seed)
    llm = build_language_model(config.language_model, tokenizer).to(run.device)
    length = config.qformer.num_query_tokens

    def step(rng: np.random.Generator) -> Losses:
        chosen = [
            scenes[int(i)] for i in rng.integers(len(scenes), size=config.language_pretraining.batch_size)
        ]
        texts = [scene_texts(s, rng, config.texts_per_image, tokenizer, pretraining=True) for s in chosen]
        packed = pack_texts(texts, length, tokenizer.pad_token_id).to(run.device)
        descriptions = [dense_description(scene, length) for scene in chosen]
        ids = tokenizer(descriptions, add_special_tokens=False, return_tensors="pt").input_ids.to(run.device)
        return {"loss": packed_lm_loss(llm, llm.get_input_embeddings()(ids), packed)}

    train(run, llm, step, config.language_pretraining)
    return llm.eval()
