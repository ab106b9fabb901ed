"""Stage 2: the Q-Former learns to write soft prompts that a frozen language model reads (BLIP-2, §3.3).

The image branch of the Q-Former starts from stage 1; a linear projection to the language model's width is
new. The only loss is the language model's own, over a caption and the answers to questions about each image.
The language model stays frozen, and its hash is compared before and after; of the image encoder only the
features are here.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from model.checkpoints.query_branch import QueryBranch
from model.language import LanguageModel
from model.matching import Matcher
from training.config import TinyConfig
from training.features import ImageFeatures
from training.language import packed_lm_loss, scene_texts
from training.loop import Losses, Run, train
from training.packing import pack_texts
from training.scenes import Scene


class FrozenPartMovedError(Exception):
    """A part that must stay frozen changed during training."""


def build_query_branch(matcher: Matcher, language_model_size: int) -> QueryBranch:
    """The image branch of a stage-1 model with a fresh projection; its text branch stays behind."""
    branch = QueryBranch(
        matcher.config, language_model_size=language_model_size, layer_norm_eps=matcher.ln_vision.eps
    )
    trained = matcher.state_dict()
    kept = {name: trained[name] for name in branch.state_dict() if name in trained}
    missing = branch.load_state_dict(kept, strict=False).missing_keys
    assert all(name.startswith("language_projection.") for name in missing), missing
    return branch


def soft_prompts(branch: QueryBranch, image_features: Tensor) -> Tensor:
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
    config: TinyConfig,
    scenes: Sequence[Scene],
    features: ImageFeatures,
    matcher: Matcher,
    language_model: LanguageModel,
) -> QueryBranch:
    """Trains the query branch; resumes where a former run stopped. Raises FrozenPartMovedError."""
    torch.manual_seed(config.seed)
    branch = build_query_branch(matcher, language_model.hidden_size).to(run.device).train()
    language_model.to(run.device).eval().requires_grad_(False)
    tokenizer, length = language_model.tokenizer, config.qformer.num_query_tokens
    before = hash_weights(language_model)

    def step(rng: np.random.Generator) -> Losses:
        chosen = rng.choice(len(scenes), size=config.stage2.batch_size, replace=False)
        texts = [
            scene_texts(scenes[int(i)], rng, config.texts_per_image, tokenizer, pretraining=False)
            for i in chosen
        ]
        packed = pack_texts(texts, length, tokenizer.pad_token_id).to(run.device)
        prefix = soft_prompts(branch, features.load(chosen).to(run.device))
        return {"loss": packed_lm_loss(language_model.llm, prefix, packed)}

    train(run, branch, step, config.stage2)
    if hash_weights(language_model) != before:
        raise FrozenPartMovedError("the language model changed during stage 2; it must be frozen")
    return branch.eval()
