"""The trained weights of a generation checkpoint, under the names they have in all formats."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from model.checkpoints.strict_loading import build_on_meta, load_strictly
from model.components import Blip2Components
from model.config import QFormerConfig
from model.language import LanguageModel
from model.matching import Matcher
from model.preprocess import ImagePreprocessor
from model.prompts import PromptTemplates
from model.qformer import QFormer, build_query_tokens
from model.qformer.text import QuestionEmbedder
from model.vision import VisionEncoder


class QFormerBranch(nn.Module):
    """All modules between image features and language model, to load weights into."""

    def __init__(
        self,
        config: QFormerConfig,
        *,
        language_model_size: int,
        layer_norm_eps: float,
        question_embedder: QuestionEmbedder | None = None,
    ) -> None:
        super().__init__()
        self.ln_vision = nn.LayerNorm(config.encoder_hidden_size, eps=layer_norm_eps)
        self.query_tokens = build_query_tokens(config)
        self.qformer = QFormer(config, has_text_branch=question_embedder is not None)
        self.language_projection = nn.Linear(config.hidden_size, language_model_size)
        if question_embedder is not None:
            self.embeddings = question_embedder.embeddings


def build_generation_components(
    config: QFormerConfig,
    tensors: Mapping[str, Tensor],
    vision_model: VisionEncoder,
    language_model: LanguageModel,
    *,
    preprocess: ImagePreprocessor,
    source: Path,
    question_embedder: QuestionEmbedder | None = None,
) -> Blip2Components:
    """Build a generation model around the tensors of a `QFormerBranch`.

    question_embedder: of a question-conditioned Q-Former, built on "meta". The prompts are those in which the
    language model answers best. Raises CheckpointError where tensors and sizes differ.
    """
    with build_on_meta(source):
        branch = QFormerBranch(
            config,
            language_model_size=language_model.hidden_size,
            layer_norm_eps=vision_model.layer_norm_eps,
            question_embedder=question_embedder,
        )
    load_strictly(branch, tensors, source=source)
    return Blip2Components(
        vision_model=vision_model,
        preprocess=preprocess,
        ln_vision=branch.ln_vision,
        query_tokens=branch.query_tokens,
        qformer=branch.qformer,
        language_projection=branch.language_projection,
        language_model=language_model,
        question_embedder=question_embedder,
        prompts=PromptTemplates(question=language_model.question_template),
    )


def build_retrieval_components(
    matcher: Matcher, vision_model: VisionEncoder, preprocess: ImagePreprocessor
) -> Blip2Components:
    """Return the components of a retrieval-only model."""
    return Blip2Components(
        vision_model=vision_model,
        preprocess=preprocess,
        ln_vision=matcher.ln_vision,
        query_tokens=matcher.query_tokens,
        qformer=matcher.qformer,
        matcher=matcher,
    )


def qformer_branch_tensors(components: Blip2Components) -> dict[str, Tensor]:
    """Return the weights of a built model under the names of `QFormerBranch`."""
    assert components.language_projection is not None, "a retrieval-only model has no generation weights"
    modules: dict[str, nn.Module] = {
        "ln_vision": components.ln_vision,
        "qformer": components.qformer,
        "language_projection": components.language_projection,
    }
    if components.question_embedder is not None:
        modules["embeddings"] = components.question_embedder.embeddings
    tensors: dict[str, Tensor] = {"query_tokens": components.query_tokens}
    for name, module in modules.items():
        tensors.update({f"{name}.{key}": value for key, value in module.state_dict().items()})
    return tensors
