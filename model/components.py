"""The built parts of a model, as a checkpoint holds them and as `Blip2` is composed of them."""

from dataclasses import dataclass, field

from torch import nn

from model.language import LanguageModel
from model.matching import Matcher
from model.preprocess import ImagePreprocessor
from model.prompts import PromptTemplates
from model.qformer import QFormer
from model.qformer.questions import QuestionReader
from model.vision import VisionEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Blip2Parts:
    """All that one model is made of.

    vision_model, preprocess: the frozen image encoder and what prepares its pixels.
    ln_vision, query_tokens, qformer: what reads the image; those of `matcher` in a retrieval-only model.
    language_projection, language_model, prompts: what puts it into words; the first two are None there.
    question_reader: what shows the question to a Q-Former that was trained so, None for any other.
    matcher: what compares it with texts; None where the checkpoint names no retrieval model.
    """

    vision_model: VisionEncoder
    preprocess: ImagePreprocessor
    ln_vision: nn.LayerNorm
    query_tokens: nn.Parameter
    qformer: QFormer
    language_projection: nn.Linear | None = None
    language_model: LanguageModel | None = None
    question_reader: QuestionReader | None = None
    matcher: Matcher | None = None
    prompts: PromptTemplates = field(default_factory=PromptTemplates)
