"""The components of a model, as a checkpoint holds them and as `Blip2` is composed of them."""

from dataclasses import dataclass, field

from torch import nn

from model.language import LanguageModel
from model.matching import Matcher
from model.preprocess import ImagePreprocessor
from model.prompts import PromptTemplates
from model.qformer import QFormer
from model.qformer.text import QuestionEmbedder
from model.vision import VisionEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Blip2Components:
    """All built modules of one model.

    vision_model, preprocess: the frozen image encoder and the preprocessor of its pixels.
    ln_vision, query_tokens, qformer: from image features to query output; those of `matcher` in a
    retrieval-only model. language_projection, language_model, prompts: from query output to text; the first
    two are None in a retrieval-only model. question_embedder: of a Q-Former that was trained on questions,
    else None. matcher: scores texts against images; None where the checkpoint names no retrieval model.
    """

    vision_model: VisionEncoder
    preprocess: ImagePreprocessor
    ln_vision: nn.LayerNorm
    query_tokens: nn.Parameter
    qformer: QFormer
    language_projection: nn.Linear | None = None
    language_model: LanguageModel | None = None
    question_embedder: QuestionEmbedder | None = None
    matcher: Matcher | None = None
    prompts: PromptTemplates = field(default_factory=PromptTemplates)
