"""Stage 2: the Q-Former learns soft prompts of a frozen language model (BLIP-2, §3.3).

The image branch of the Q-Former is initialised from stage 1; the linear projection to the language model's
width is new. The only loss is the language model's, on the QA turns of each image. The frozen image encoder
is absent: batches hold its features. The language model's hash is compared before and after.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from model.checkpoints import QFormerBranch
from model.language import LanguageModel
from model.matching import Matcher
from training.config import Optimization
from training.data.batches import QaSampler, QaTurn
from training.diagnostics import query_cosine
from training.loop import Losses, Run, train
from training.provenance import hash_module
from training.stages.decoder_only import build_decoder_only_objective
from training.stages.encoder_decoder import EncoderDecoderObjective
from training.stages.turn_tokenizer import TurnTokenizer

MAX_TEXT_TOKENS = 128


class LanguageObjective(Protocol):
    """The training objective of a frozen language model behind soft prompts."""

    @property
    def llm(self) -> PreTrainedModel: ...

    def loss(self, prefix: Tensor, qa_turns: Sequence[Sequence[QaTurn]]) -> Tensor:
        """Compute the mean loss of each image's QA turns behind its soft prompt, prefix [B, Q, L]."""
        ...


def build_objective(
    language_model: LanguageModel, *, max_text_tokens: int = MAX_TEXT_TOKENS
) -> LanguageObjective:
    """Build the objective of a language model of either kind, which tokenises and ends as the service does.

    max_text_tokens: of a text. A longer one is cut but keeps its end token. BLIP-2 trained with 32.
    """
    if language_model.llm.config.is_encoder_decoder:
        return EncoderDecoderObjective(language_model, TurnTokenizer(language_model), max_text_tokens)
    return build_decoder_only_objective(language_model, max_text_tokens=max_text_tokens)


class FrozenWeightsChangedError(Exception):
    """The weights of a frozen model changed during training."""


def build_query_branch(matcher: Matcher, language_model_size: int) -> QFormerBranch:
    """Build the image branch of a stage-1 model with a new projection, without the text branch."""
    branch = QFormerBranch(
        matcher.config, language_model_size=language_model_size, layer_norm_eps=matcher.ln_vision.eps
    )
    stage1_state = matcher.state_dict()
    shared = {name: stage1_state[name] for name in branch.state_dict() if name in stage1_state}
    missing = branch.load_state_dict(shared, strict=False).missing_keys
    assert set(missing) == {"language_projection.weight", "language_projection.bias"}, missing
    return branch


def train_stage2(
    run: Run,
    optimization: Optimization,
    sample_batch: QaSampler,
    branch: QFormerBranch,
    objective: LanguageObjective,
) -> QFormerBranch:
    """Train the query branch in place; resumes from its last checkpoint.

    The figures of a step are `loss` and, without gradient, `query_cosine` (see `diagnostics`). Raises
    FrozenWeightsChangedError if the language model changed.
    """
    branch.to(run.device).train()
    llm = objective.llm.to(run.device).eval().requires_grad_(False)
    initial_hash = hash_module(llm)

    def step(index: int, rng: np.random.Generator) -> Losses:
        batch = sample_batch(index, rng)
        query_output = encode_queries(branch, batch.image_features.to(run.device))  # [B, Q, D]
        loss = objective.loss(branch.language_projection(query_output), batch.qa_turns)
        return {"loss": loss, "query_cosine": query_cosine(query_output)}

    train(run, branch, step, optimization)
    if hash_module(llm) != initial_hash:
        raise FrozenWeightsChangedError("the language model changed during stage 2; it must be frozen")
    return branch.eval()


def soft_prompts(branch: QFormerBranch, image_features: Tensor) -> Tensor:
    """Encode [B, P, V] image features into [B, Q, L] language-model inputs."""
    soft_tokens: Tensor = branch.language_projection(encode_queries(branch, image_features))
    return soft_tokens


def encode_queries(branch: QFormerBranch, image_features: Tensor) -> Tensor:
    """Attend with the queries to [B, P, V] image features; return [B, Q, D] query outputs."""
    query_tokens = branch.query_tokens.expand(len(image_features), -1, -1)  # [B, Q, D]
    return branch.qformer.encode_queries(query_tokens, branch.ln_vision(image_features)).query_output
