"""The gate of a language model: captions and answers behind dense descriptions, the ideal soft prompts."""

import json
from collections.abc import Sequence

from torch import Tensor

from model.checkpoints import load_language_model
from model.prompts import PromptTemplates
from training.config import ConfigError
from training.tiny.gates.generation import GenerationResult, PromptedGenerator, measure_generation
from training.tiny.gates.plan import GatePlan
from training.tiny.gates.results import Bar, Measurement
from training.tiny.language import embed_descriptions
from training.world.qa_turns import QUESTION_PROMPT
from training.world.scenes import Scene

_QUESTION_BAR = 0.95
_CAPTION_BAR = 0.9


def measure_language_model(phase: str, plan: GatePlan) -> Measurement:
    """Measure a language model of a run, decoder-only or encoder-decoder."""
    language_model = load_language_model(plan.result(phase)).to(plan.device)
    length = plan.num_query_tokens or _configured_length(phase, plan)

    def prefix(scenes: Sequence[Scene]) -> Tensor:
        return embed_descriptions(language_model.llm, language_model.tokenizer, scenes, length)

    prompts = PromptTemplates(caption="", question=QUESTION_PROMPT)
    return judge_language_model(measure_generation(PromptedGenerator(language_model, prompts, prefix), plan))


def judge_language_model(generated: GenerationResult) -> Measurement:
    """Compare texts generated from descriptions with the bars."""
    figures = generated.figures
    bars = (
        Bar("unseen: questions, macro", figures["questions, unseen"]["macro"], _QUESTION_BAR),
        Bar("unseen: captions wholly true", figures["captions, unseen"]["wholly_true"], _CAPTION_BAR),
    )
    return Measurement(figures, bars, samples=generated.samples, mistakes=generated.mistakes)


def _configured_length(phase: str, plan: GatePlan) -> int:
    """Load the number of query tokens from the run's configuration."""
    path = plan.out / phase / "run.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["config"]["qformer"]["num_query_tokens"])
    except (OSError, KeyError, ValueError) as exc:
        raise ConfigError(f"{path} holds no length of a description ({exc!r}); give --queries") from exc
