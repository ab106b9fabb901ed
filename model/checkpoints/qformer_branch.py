"""The trained weights of a generation checkpoint, under the names all formats give them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from model.checkpoints.tensors import load_strictly
from model.components import Blip2Parts
from model.config import QFormerConfig
from model.language import LanguageModel
from model.matching import Matcher
from model.preprocess import ImagePreprocessor
from model.prompts import PromptTemplates
from model.qformer import QFormer, build_query_tokens
from model.qformer.questions import QuestionReader
from model.vision import VisionEncoder


class QueryBranch(nn.Module):
    """What stands between image features and language model; a place to load weights into."""

    def __init__(
        self,
        config: QFormerConfig,
        *,
        language_model_size: int,
        layer_norm_eps: float,
        question_reader: QuestionReader | None = None,
    ) -> None:
        super().__init__()
        self.ln_vision = nn.LayerNorm(config.encoder_hidden_size, eps=layer_norm_eps)
        self.query_tokens = build_query_tokens(config)
        self.qformer = QFormer(config, has_text_branch=question_reader is not None)
        self.language_projection = nn.Linear(config.hidden_size, language_model_size)
        if question_reader is not None:
            self.embeddings = question_reader.embeddings


def build_generation_parts(
    config: QFormerConfig,
    tensors: Mapping[str, Tensor],
    vision_model: VisionEncoder,
    language_model: LanguageModel,
    *,
    preprocess: ImagePreprocessor,
    source: Path,
    question_reader: QuestionReader | None = None,
    prompts: PromptTemplates | None = None,
    matcher: Matcher | None = None,
) -> Blip2Parts:
    """Builds a model that writes around the tensors of a `QueryBranch`.

    question_reader: for a Q-Former that is shown the question, built on "meta". prompts: None for those that
    the language model answers best to. Raises CheckpointError where tensors and sizes do not agree.
    """
    with torch.device("meta"):
        branch = QueryBranch(
            config,
            language_model_size=language_model.hidden_size,
            layer_norm_eps=vision_model.layer_norm_eps,
            question_reader=question_reader,
        )
    load_strictly(branch, tensors, source=source)
    return Blip2Parts(
        vision_model=vision_model,
        preprocess=preprocess,
        ln_vision=branch.ln_vision,
        query_tokens=branch.query_tokens,
        qformer=branch.qformer,
        language_projection=branch.language_projection,
        language_model=language_model,
        question_reader=question_reader,
        matcher=matcher,
        prompts=prompts or PromptTemplates(question=language_model.question_template),
    )


def build_retrieval_parts(
    matcher: Matcher, vision_model: VisionEncoder, preprocess: ImagePreprocessor
) -> Blip2Parts:
    """Gives the parts of a model that only compares."""
    return Blip2Parts(
        vision_model=vision_model,
        preprocess=preprocess,
        ln_vision=matcher.ln_vision,
        query_tokens=matcher.query_tokens,
        qformer=matcher.qformer,
        matcher=matcher,
    )


def query_branch_tensors(parts: Blip2Parts) -> dict[str, Tensor]:
    """Gives the weights of a `QueryBranch` of a built model, under the same names."""
    assert parts.language_projection is not None, "a retrieval-only model has no generation weights"
    modules: dict[str, nn.Module] = {
        "ln_vision": parts.ln_vision,
        "qformer": parts.qformer,
        "language_projection": parts.language_projection,
    }
    if parts.question_reader is not None:
        modules["embeddings"] = parts.question_reader.embeddings
    tensors: dict[str, Tensor] = {"query_tokens": parts.query_tokens}
    for name, module in modules.items():
        tensors.update({f"{name}.{key}": value for key, value in module.state_dict().items()})
    return tensors
