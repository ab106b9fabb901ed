"""Stage 2: the Q-Former learns to write soft prompts that a frozen language model reads (BLIP-2, §3.3).

The image branch of the Q-Former starts from stage 1; a linear projection to the language model's width is
new. The only loss is the language model's own, over a caption and the answers to questions about each image.
The language model stays frozen, and its hash is compared before and after; of the image encoder only the
features are here.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model.checkpoints import QFormerBranch
from model.matching import Matcher
from training.config import Optimization
from training.exchanges import Exchange, sample_exchanges
from training.features import ImageFeatures
from training.loop import Losses, Run, train
from training.scenes import Scene


class Reader(Protocol):
    """A frozen language model as stage 2 sees it."""

    @property
    def llm(self) -> PreTrainedModel: ...

    def loss(self, prefix: Tensor, exchanges: Sequence[Sequence[Exchange]]) -> Tensor:
        """The language-model loss of each image's exchanges behind its soft prompt, prefix [B, Q, L]."""
        ...


class FrozenPartMovedError(Exception):
    """A part that must stay frozen changed during training."""


def build_query_branch(matcher: Matcher, language_model_size: int) -> QFormerBranch:
    """The image branch of a stage-1 model with a fresh projection; its text branch stays behind."""
    branch = QFormerBranch(
        matcher.config, language_model_size=language_model_size, layer_norm_eps=matcher.ln_vision.eps
    )
    trained = matcher.state_dict()
    kept = {name: trained[name] for name in branch.state_dict() if name in trained}
    missing = branch.load_state_dict(kept, strict=False).missing_keys
    assert all(name.startswith("language_projection.") for name in missing), missing
    return branch


def soft_prompts(branch: QFormerBranch, image_features: Tensor) -> Tensor:
    """Turns [B, P, V] image features into [B, Q, L] language-model inputs."""
    query_tokens = branch.query_tokens.expand(len(image_features), -1, -1)  # [B, Q, D]
    states = branch.qformer.encode_queries(query_tokens, branch.ln_vision(image_features))
    return branch.language_projection(states.query_output)


def hash_weights(module: nn.Module) -> str:
    """SHA-256 over the names and bytes of all tensors of a module."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train_stage2(
    run: Run,
    optimization: Optimization,
    scenes: Sequence[Scene],
    features: ImageFeatures,
    branch: QFormerBranch,
    reader: Reader,
    num_questions: int,
) -> QFormerBranch:
    """Trains the query branch; resumes where a former run stopped. Raises FrozenPartMovedError."""
    branch.to(run.device).train()
    llm = reader.llm.to(run.device).eval().requires_grad_(False)
    before = hash_weights(llm)

    def step(rng: np.random.Generator) -> Losses:
        chosen = rng.choice(len(scenes), size=optimization.batch_size, replace=False)
        prefix = soft_prompts(branch, features.load(chosen).to(run.device))  # [B, Q, L]
        exchanges = [sample_exchanges(scenes[int(i)], rng, num_questions) for i in chosen]
        return {"loss": reader.loss(prefix, exchanges)}

    train(run, branch, step, optimization)
    if hash_weights(llm) != before:
        raise FrozenPartMovedError("the language model changed during stage 2; it must be frozen")
    return branch.eval()
